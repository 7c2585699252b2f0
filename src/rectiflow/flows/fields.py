"""Fields: what solvers, guidance and distillation see; `FlowModel` makes one of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

from rectiflow.errors import unknown
from rectiflow.flows.paths import PREDICTIONS, Path, RectifiedPath
from rectiflow.nets.base import null_condition_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Velocity = Callable[..., Any]
SHOWN = ("path", "shape", "check", "remembers", "conditional")
"""What of a field shows through one that counts its evaluations."""


@runtime_checkable
class Field(Protocol):
    """A velocity field on a known path.

    Solvers accept any callable `velocity(x, t, **condition)`; guidance, steering and conversion
    need these four members. `t` has shape `(b,)`.
    """

    @property
    def path(self) -> Path:
        """The path it belongs to."""

    def velocity(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The direction of travel at `(x, t)`."""

    def denoise(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The estimate of the target."""

    def noise(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The estimate of the source."""


def velocity_of(field: Field | Velocity) -> Velocity:
    """The velocity function of a field, or the callable itself."""
    return cast(Velocity, getattr(field, "velocity", field))


class FlowModel(nn.Module):
    """A field made of any network `net(x, t, **condition) -> tensor`, and the artifact of a run.

    The network is used as it is: nothing is subclassed and nothing is written into it. Every
    command reads and writes models of this class with `from_pretrained` and `save_pretrained`.

    Args:
        net: the network. `t` reaches it as a `(b,)` tensor in [0, 1].
        path: the path it was (or will be) trained on; rectified by default.
        prediction: what the network outputs: velocity, noise, data, score or v.
        shape: the shape of one sample, needed to sample without giving noises.
        sampling: how the model is meant to be sampled, such as `{"solver": "euler", "steps": 1}`.
        data: what it was trained on (name, classes), for people and reports.
        lineage: what was done to make it, oldest first; each entry is a plain dictionary.

    Raises:
        ValueError: an unknown prediction.

    Example:
        >>> import torch
        >>> model = FlowModel(lambda x, t: 3 - x)
        >>> x, t = torch.tensor([[1.0]]), torch.tensor([0.5])
        >>> model.velocity(x, t), model.denoise(x, t)
        (tensor([[2.]]), tensor([[2.]]))
    """

    def __init__(
        self,
        net: nn.Module | Callable[..., Tensor],
        path: Path | None = None,
        prediction: str = "velocity",
        *,
        shape: Sequence[int] | None = None,
        sampling: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        lineage: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        self.net: Any = net
        self.path = path if path is not None else RectifiedPath()
        self.prediction = prediction
        self.shape = tuple(shape) if shape is not None else None
        self.sampling = {"solver": "euler", "steps": 50, **(sampling or {})}
        self.data = dict(data or {})
        self.lineage = [dict(entry) for entry in lineage]

    def forward(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The network's own output."""
        return self.net(x, t, **condition)

    def velocity(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The direction of travel at `(x, t)`."""
        output = self.net(x, t, **condition)
        if self.prediction == "velocity":
            return output
        return self.path.convert(output, x, t, given=self.prediction, wanted="velocity")

    def denoise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The estimate of the target (data)."""
        output = self.net(x, t, **condition)
        return self.path.convert(output, x, t, given=self.prediction, wanted="data")

    def noise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The estimate of the source (noise)."""
        output = self.net(x, t, **condition)
        return self.path.convert(output, x, t, given=self.prediction, wanted="noise")

    def score(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The gradient of the log-density at time t, for a standard normal source."""
        output = self.net(x, t, **condition)
        return self.path.convert(output, x, t, given=self.prediction, wanted="score")

    @property
    def classes(self) -> int:
        """How many class labels the network takes; 0 for one without labels."""
        return int(getattr(self.net, "classes", 0))

    @property
    def conditional(self) -> bool:
        """Whether the network takes a condition: class labels, or text."""
        return self.classes > 0 or bool(getattr(self.net, "conditional", False))

    def null_condition(self, **condition: Any) -> dict[str, Any]:
        """The condition that stands for "none", for guidance and condition dropout."""
        return null_condition_of(self.net, condition)

    def check(self, x: Tensor, **condition: Any) -> None:
        """Raise ValueError if states or condition are not what the model takes."""
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"states must have shape (batch, {', '.join(map(str, self.shape))}), "
                f"got {tuple(x.shape)}"
            )
        known = getattr(self.net, "check", None)
        if known is not None:
            known(x, **condition)

    def save_pretrained(self, folder: str | FilePath, *, overwrite: bool = False) -> FilePath:
        """Write the model folder: safetensors, `config.json` and a model card.

        Raises:
            FileExistsError: the folder exists and `overwrite` is not set.
        """
        from rectiflow.flows.artifact import save

        return save(self, folder, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls, source: str | FilePath, *, net: nn.Module | None = None, revision: str | None = None
    ) -> FlowModel:
        """Read a model folder, or a model of that name on the Hub.

        Weights are read into the network's own types, which are float32 for networks built here:
        what was saved in half or double precision is converted.

        Args:
            source: a folder, or `owner/name` on the Hub.
            net: the network to load weights into, for networks that rectiflow did not build.
            revision: Hub revision.

        Raises:
            ModelFolderError: a file is missing, damaged, unsafe or of the wrong shape.
        """
        from rectiflow.flows.artifact import load

        return load(source, net=net, revision=revision)

    def push_to_hub(self, name: str, *, private: bool = False) -> str:
        """Upload the model folder to the Hub as `owner/name`; returns its address."""
        from rectiflow.flows.artifact import push

        return push(self, name, private=private)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer (CPU for a model without any)."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(field: Any, device: torch.device | None = None) -> Iterator[None]:
    """Put a field's modules in evaluation mode for the block, then back as they were.

    Of a guided field they are those of the field inside. With a device they are moved there and
    stay: that of a training's own process, for a teacher that nobody else has moved.
    """
    while field is not None and not isinstance(field, nn.Module):
        field = getattr(field, "field", None)
    if device is not None and field is not None and device_of(field) != device:
        field.to(device)
    modules = [m for m in field.modules() if m.training] if field is not None else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@dataclass
class Counted:
    """A field that counts its evaluations, to compare adaptive with fixed-step solvers.

    What else the field has (its path, its checks, its memory) shows through.

    Example:
        >>> import torch
        >>> field = Counted(lambda x, t: -x)
        >>> _ = field(torch.ones(2, 1), torch.zeros(2)); field.evaluations
        1
    """

    field: Any
    evaluations: int = 0
    around: Counted | None = None

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        self.evaluations += 1
        if self.around is not None:
            self.around.evaluations += 1
        return velocity_of(self.field)(x, t, **condition)

    def __getattr__(self, name: str) -> Any:
        if name not in SHOWN:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.__dict__["field"], name)

    def begin(self) -> Counted:
        """The field for one trajectory, counted here too."""
        begin = getattr(self.field, "begin", None)
        return self if begin is None else Counted(begin(), around=self)
