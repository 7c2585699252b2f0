"""Low-rank adapters: train a small part of a model, merge it, or keep it in a file of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from rectiflow import nets
from rectiflow.errors import positive, require
from rectiflow.files import atomic_path
from rectiflow.flows.fields import FlowModel

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class AdaptedNet(nn.Module):
    """A network with low-rank adapters (peft) beside some of its layers.

    Made by `with_lora`. The network inside is a copy; only the adapters want gradients.

    Args:
        net: the network, or `{"name": ..., "config": ...}` to make a new one from.
        rank: rank of the adapters.
        targets: names, or endings of names, of the layers that get one.
        alpha: the adapters' output is scaled by `alpha / rank`.
    """

    name: ClassVar[str] = "lora"

    def __init__(
        self,
        *,
        net: nn.Module | Mapping[str, Any],
        rank: int,
        targets: Sequence[str],
        alpha: float,
    ) -> None:
        super().__init__()
        require("lora", "peft")
        from peft import LoraConfig, inject_adapter_in_model

        positive("rank", rank)
        if isinstance(net, Mapping):
            net = nets.build(net["name"], **net["config"])
        described = {"name": getattr(net, "name", None), "config": getattr(net, "config", None)}
        matched = [key for key, part in net.named_modules() if _matches(key, part, targets)]
        if not matched:
            layers = [key for key, part in net.named_modules() if isinstance(part, nn.Linear)]
            raise ValueError(
                f"no layer is called {', '.join(targets)}: this network has linear layers such as "
                f"{', '.join(layers[:4])}"
            )
        options = LoraConfig(r=rank, lora_alpha=alpha, target_modules=matched)
        self.net = inject_adapter_in_model(options, net)
        self.classes = int(getattr(net, "classes", 0))
        self.config: dict[str, Any] = {
            "net": described, "rank": rank, "targets": list(targets), "alpha": alpha,
        }  # fmt: skip

    def forward(self, x: Any, t: Any, **condition: Any) -> Any:
        return self.net(x, t, **condition)

    @property
    def conditional(self) -> bool:
        """Whether the network inside takes text."""
        return bool(getattr(self.net, "conditional", False))

    def null_condition(self, **condition: Any) -> dict[str, Any]:
        """The null condition of the network inside."""
        return self.net.null_condition(**condition)

    def check(self, x: Any, **condition: Any) -> None:
        """Whatever the network inside checks."""
        known = getattr(self.net, "check", None)
        if known is not None:
            known(x, **condition)


def with_lora(
    model: FlowModel,
    rank: int = 8,
    targets: Sequence[str] | None = None,
    *,
    alpha: float | None = None,
    seed: int = 0,
) -> FlowModel:
    """A copy of a model that trains low-rank adapters instead of its weights.

    It makes the same samples as the model until it is trained. Reflow and distillation take it in
    place of a model and train the adapters alone.

    Args:
        model: the model; it is not changed.
        rank: rank of the adapters.
        targets: names, or endings of names, of the layers that get one; the projections of
            attention by default, or all linear layers of a network without them.
        alpha: scale of the adapters; the rank by default, so that they count once.
        seed: of the adapters' first weights.

    Raises:
        ValueError: no such layer, or a model that has adapters already.
        MissingExtraError: peft is not installed.

    Example:
        >>> from rectiflow.nets import MLP
        >>> model = FlowModel(MLP(shape=(2,), width=8, depth=1), shape=(2,))
        >>> thin = with_lora(model, rank=2, targets=["inner"])
        >>> sum(p.numel() for p in thin.parameters() if p.requires_grad)
        32

    Source: arXiv 2106.09685.
    """
    if isinstance(model.net, AdaptedNet):
        raise ValueError("the model has adapters already: merge_lora first")
    net = copy.deepcopy(model.net)
    if not isinstance(net, nn.Module):
        raise ValueError(f"adapters need a network that is a torch module, got {type(net)}")
    chosen = tuple(targets) if targets is not None else _usual(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = AdaptedNet(
            net=net, rank=rank, targets=chosen, alpha=float(rank if alpha is None else alpha)
        )
    return only_adapters(_around(model, adapted).train(model.training))


def only_adapters(model: FlowModel) -> FlowModel:
    """The model itself; if it has adapters, its other weights now want no gradient."""
    if isinstance(model.net, AdaptedNet):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return model


def merge_lora(model: FlowModel) -> FlowModel:
    """A plain model with the adapters added to the weights; the one given is not changed.

    Raises:
        ValueError: a model without adapters.

    Example:
        >>> from rectiflow.nets import MLP
        >>> model = FlowModel(MLP(shape=(2,), width=8, depth=1), shape=(2,))
        >>> merge_lora(with_lora(model, 2, ["inner"])).net.name
        'mlp'
    """
    net = copy.deepcopy(_adapted(model).net)
    for name, layer in _layers(net).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, layer.get_base_layer())
    return _around(model, net.requires_grad_(True)).train(model.training)


def lora_delta(model: FlowModel) -> dict[str, Tensor]:
    """What the adapters add to each weight, by the weight's name: for `add_delta` elsewhere.

    Raises:
        ValueError: a model without adapters.
    """
    found = _layers(_adapted(model).net)
    return {
        f"{name}.weight": layer.get_delta_weight("default").detach().clone()
        for name, layer in found.items()
    }


def save_lora(model: FlowModel, file: Path | str) -> Path:
    """Write the adapters alone to a safetensors file.

    Raises:
        ValueError: a model without adapters, or a file name of another kind.
    """
    from safetensors.torch import save

    net, file = _adapted(model), Path(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"adapters are saved as safetensors only, got {file.name}")
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in net.net.state_dict().items()
        if "lora_" in name
    }
    facts = json.dumps({key: net.config[key] for key in ("rank", "targets", "alpha")})
    with atomic_path(file) as temporary:
        temporary.write_bytes(save(tensors, metadata={"rectiflow": facts}))
    return file


def load_lora(model: FlowModel, file: Path | str) -> FlowModel:
    """The model with the adapters of a file of `save_lora`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or adapters of another network.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no adapters at {file}: give a file of save_lora")
    try:
        with safe_open(file, framework="pt") as stream:
            facts = json.loads((stream.metadata() or {})["rectiflow"])
            state = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        options = {"rank": facts["rank"], "targets": facts["targets"], "alpha": facts["alpha"]}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} holds no adapters of save_lora ({error})") from None
    adapted = with_lora(model, **options)
    net = _adapted(adapted).net
    own = {name: value for name, value in net.state_dict().items() if "lora_" in name}
    wrong = set(own) ^ set(state) or {n for n in own if own[n].shape != state[n].shape}
    if wrong:
        raise ValueError(f"{file} belongs to another network: {sorted(wrong)[0]} does not fit")
    net.load_state_dict(state, strict=False)
    return adapted


def _adapted(model: FlowModel) -> AdaptedNet:
    if not isinstance(model.net, AdaptedNet):
        raise ValueError("the model has no adapters: make them by with_lora")
    return model.net


def _layers(net: nn.Module) -> dict[str, Any]:
    """The layers with adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in net.named_modules() if isinstance(part, BaseTunerLayer)}


def _matches(key: str, part: nn.Module, targets: Sequence[str]) -> bool:
    fits = any(key == target or key.endswith("." + target) for target in targets)
    return fits and isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding)


def _usual(net: nn.Module) -> tuple[str, ...]:
    linear = [name for name, part in net.named_modules() if isinstance(part, nn.Linear)]
    attention = any(name.endswith(ATTENTION) for name in linear)
    return ATTENTION if attention else tuple(linear)


def _around(model: FlowModel, net: nn.Module) -> FlowModel:
    """A model like the given one around another network."""
    return FlowModel(
        net,
        model.path,
        model.prediction,
        shape=model.shape,
        sampling=model.sampling,
        data=model.data,
        lineage=model.lineage,
    )
