"""Inversion, and edits of real images that reuse what inversion saw."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.fields import evaluating
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.flows.guided import begun
from rectiflow.flows.implicit_midpoint import ImplicitMidpoint
from rectiflow.flows.integration import Corrector, Step, integrate, time_grid
from rectiflow.flows.solvers import RungeKutta, resolve
from rectiflow.images.feature_bank import FeatureBank
from rectiflow.images.latent_editing import decode, encode

if TYPE_CHECKING:
    from jaxtyping import Float

# Of two evaluations each: as many as 30 Euler steps.
STEPS = 15
ROWS = "edited_rows"


@dataclass(frozen=True)
class RoundTrip:
    """Images, their noises, and what comes back.

    Attributes:
        noise: the noises that the flow assigns to the images.
        images: what the flow makes of these noises.
        error: root mean square over the numbers of each image, `(b,)`.
    """

    noise: Tensor
    images: Tensor
    error: Tensor


@torch.no_grad()
def invert(
    model: Any,
    images: Float[Tensor, "b *dims"],
    *,
    steps: int | Sequence[float] = STEPS,
    solver: Any = "rf-solver",
    batch_size: int = 1024,
    correctors: Sequence[Corrector] = (),
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """The noises from which a flow makes given images, by the second-order step of RF-Solver.

    It is `encode` with the paper's settings: 15 steps, 30 evaluations, no guidance. The noise
    errs by the square of the step, but a round trip on the same grid by its cube, since the
    solver's leading errors cancel on the way back. Euler's do not. Half-precision states round
    off more than either.

    Args:
        model: a `Field`.
        images: images (or latents) on the model's device.
        steps: number of equal steps, or a rising grid of times such as `flux_times(15, 4096)`.
        solver: an ODE solver; "rf-solver:0.667" and "implicit-midpoint" are other choices.
        batch_size: images computed together.
        correctors: called after each step, see `integrate`.
        **condition: one row an image for tensors.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> model = FlowModel(lambda x, t: torch.ones_like(x))
        >>> invert(model, torch.ones(1, 2), steps=2)
        tensor([[0., 0.]])

    Source: arXiv 2411.04746, section 3.2 and algorithm 1.
    """
    options: dict[str, Any] = {"steps": steps, "solver": solver, "batch_size": batch_size}
    return encode(model, images, correctors=correctors, **options, **condition)


@torch.no_grad()
def round_trip(
    model: Any,
    images: Float[Tensor, "b *dims"],
    *,
    steps: int | Sequence[float] = STEPS,
    solver: Any = "rf-solver",
    batch_size: int = 1024,
    correctors: Sequence[Corrector] = (),
    **condition: Any,
) -> RoundTrip:
    """Invert images and generate them again on the same grid, to see whether edits can be trusted.

    Args:
        model: a `Field`.
        images: images (or latents) on the model's device.
        steps: number of equal steps, or a rising grid of times.
        solver: the ODE solver of both ways.
        batch_size: images computed together.
        correctors: called after each step of both ways.
        **condition: one row an image for tensors.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> model = FlowModel(lambda x, t: torch.ones_like(x))
        >>> round_trip(model, torch.ones(1, 2), steps=2).error
        tensor([0.])

    Source: arXiv 2411.04746, section 4.3 (inversion and reconstruction).
    """
    options: dict[str, Any] = {
        "steps": steps,
        "solver": solver,
        "batch_size": batch_size,
        "correctors": correctors,
        **condition,
    }
    noise = encode(model, images, **options)
    back = decode(model, noise, **options)
    error = (back - images).float().square().flatten(1).mean(1).sqrt()
    return RoundTrip(noise, back, error)


@dataclass(frozen=True)
class Edit:
    """Edited images.

    Attributes:
        images: one row a target; those of the first image come first.
        noise: the noises of the images, from which the edits start.
        bytes: size of the feature bank.
    """

    images: Tensor
    noise: Tensor
    bytes: int


@dataclass(frozen=True)
class RFEdit:
    """Change what an image shows and keep how it is built: RF-Edit.

    The image is inverted under the condition that describes it, without guidance. From the noise
    found, an image is generated under the target condition, and in its first `inject` steps the
    attention values of the later blocks are those of the inversion. More injected steps keep more
    of the image and change less: start with 2 or 3, and with 0 for the plain edit. Guidance is
    classifier-free where the network has no guidance of its own, with values injected into the
    conditional half only; FLUX.1 dev takes `guidance` as its built-in input.

    Args:
        model: a `FlowModel` of an MMDiT or of a Stable Diffusion 3 or FLUX pipeline.
        steps: number of equal steps, or a rising grid of times such as `flux_times(15, 4096)`.
        inject: how many steps, from the noisy end, replay attention values.
        guidance: scale toward the target, >= 0.
        invert_guidance: scale of the inversion; anything but 1 makes it worse.
        solver: rf-solver, another Runge-Kutta method, or implicit-midpoint.
        select: which attentions, see `FeatureBank`.
        where: "device" or "cpu", see `FeatureBank`.
        budget: bytes of the feature bank, see `FeatureBank`.
        guide: makes the guided field of a field and a scale.

    Raises:
        ValueError: a negative or infinite scale, `inject` beyond the steps, or a solver whose
            passes do not pair.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> from rectiflow.nets import MMDiT
        >>> model = FlowModel(MMDiT(shape=(1, 4, 4), depth=2, head_dim=4, classes=3))
        >>> edit = RFEdit(model, steps=3, inject=1)
        >>> label = {"label": torch.tensor([0])}, {"label": torch.tensor([1, 2])}
        >>> edit(torch.zeros(1, 1, 4, 4), source=label[0], target=label[1]).images.shape
        torch.Size([2, 1, 4, 4])

    Source: arXiv 2411.04746, section 3.3 and algorithm 2. Values of step j are recorded on the
        way up to its noisy end and replayed on the way down from it, as in the released code:
        first evaluations thus pair neighbouring times, later ones the same time. The conditional
        half alone under classifier-free guidance is our choice; the paper's model has no other.
    """

    model: Any
    steps: int | Sequence[float] = STEPS
    inject: int = 3
    guidance: float = 2.0
    invert_guidance: float = 1.0
    solver: Any = "rf-solver"
    select: str | None = None
    where: str = "device"
    budget: int | None = None
    guide: Callable[[Any, float], Any] = ClassifierFreeGuidance

    def __post_init__(self) -> None:
        for name in ("guidance", "invert_guidance"):
            value = getattr(self, name)
            positive(name, value, zero=True)
            if math.isinf(value):
                raise ValueError(f"{name} must be finite, got {value}")
        count = len(time_grid(self.steps)) - 1
        if not 0 <= self.inject <= count:
            raise ValueError(f"inject must be from 0 to the {count} steps, got {self.inject}")
        if not isinstance(resolve(self.solver), RungeKutta | ImplicitMidpoint):
            raise ValueError(
                f"edits need a solver with the same evaluations in both directions, such as "
                f"rf-solver, euler or implicit-midpoint, got {self.solver!r}"
            )

    @torch.no_grad()
    def __call__(
        self,
        images: Float[Tensor, "b *dims"],
        *,
        source: Mapping[str, Any],
        target: Mapping[str, Any],
        progress: Callable[[int], None] | None = None,
    ) -> Edit:
        """Edit images.

        Args:
            images: images (or latents) on the model's device.
            source: the condition that describes them, one row an image.
            target: the condition wanted: one row an image, or a whole number of rows for each,
                those of the first image first.
            progress: called with the number of steps done, of twice `steps`.
        """
        grid = time_grid(self.steps)
        wanted = _rows(target, len(images))
        if wanted % len(images):
            raise ValueError(
                f"target must have a whole number of rows for each of the {len(images)} images, "
                f"got {wanted}"
            )
        bank = None
        if self.inject:
            bank = FeatureBank(self.model, select=self.select, where=self.where, budget=self.budget)
        attached: Any = contextlib.nullcontext() if bank is None else bank.attached()
        with evaluating(self.model), attached:
            state = self._follow(
                images, grid[::-1], source, self.invert_guidance, bank, "record", progress, 0
            )
            start = state.repeat_interleave(wanted // len(images), 0)
            made = self._follow(
                start, grid, target, self.guidance, bank, "replay", progress, len(grid) - 1
            )
        noise = self.model.path.source_of(state)
        return Edit(made, noise, 0 if bank is None else bank.bytes)

    def _follow(
        self,
        x: Tensor,
        grid: Sequence[float],
        condition: Mapping[str, Any],
        scale: float,
        bank: FeatureBank | None,
        mode: str,
        progress: Callable[[int], None] | None,
        done: int,
    ) -> Tensor:
        """One pass, recording or replaying near the noisy end."""
        given = dict(condition)
        if "guidance" in getattr(getattr(self.model, "net", None), "defaults", {}):
            # The network's own guidance: there is no second half.
            given["guidance"], scale = x.new_full((len(x),), scale), 1.0
        if not given:
            scale = 1.0
        count = len(grid) - 1
        field: Any = self.guide(self.model, scale)

        def turn(index: int) -> None:
            assert bank is not None
            bank.step, bank.stage = index if mode == "replay" else count - 1 - index, 0
            bank.mode = mode if 0 <= bank.step < self.inject and index < count else "off"

        def after(step: Step) -> Tensor:
            if bank is not None:
                turn(step.index + 1)
            if progress is not None:
                progress(done + step.index + 1)
            return step.after

        if bank is not None:
            field = _Staged(self.guide(_Marked(self.model, bank), scale), bank)
            # On the CPU, where counting them waits for nothing.
            given[ROWS] = torch.ones(len(x), dtype=torch.bool)
            turn(0)
        return integrate(field, x, grid, self.solver, correctors=(after,), **given)


@dataclass(frozen=True)
class _Staged:
    """A guided field that counts its evaluations within a step for the bank."""

    field: Any
    bank: FeatureBank

    @property
    def path(self) -> Any:
        return self.field.path

    def velocity(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return self._said("velocity", x, t, condition)

    def denoise(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return self._said("denoise", x, t, condition)

    def noise(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return self._said("noise", x, t, condition)

    def begin(self) -> _Staged:
        return _Staged(begun(self.field), self.bank)

    def check(self, x: Tensor, **condition: Any) -> None:
        _check(self.field, x, condition)

    def _said(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        found = getattr(self.field, view)(x, t, **condition)
        self.bank.stage += 1
        return found


@dataclass(frozen=True)
class _Marked:
    """A model that is told which rows are conditional, however guidance stacks its calls."""

    model: Any
    bank: FeatureBank

    @property
    def path(self) -> Any:
        return self.model.path

    def velocity(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return self._said("velocity", x, t, condition)

    def denoise(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return self._said("denoise", x, t, condition)

    def noise(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return self._said("noise", x, t, condition)

    def null_condition(self, **condition: Any) -> dict[str, Any]:
        rows = condition.pop(ROWS)
        null = self.model.null_condition(**condition) if condition else {}
        return {**null, ROWS: torch.zeros_like(rows)}

    def check(self, x: Tensor, **condition: Any) -> None:
        _check(self.model, x, {k: v for k, v in condition.items() if k != ROWS})

    def _said(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        self.bank.rows = condition.pop(ROWS)
        return getattr(self.model, view)(x, t, **condition)


def _check(field: Any, x: Tensor, condition: Mapping[str, Any]) -> None:
    known = getattr(field, "check", None)
    if known is not None:
        known(x, **condition)


def _rows(condition: Mapping[str, Any], default: int) -> int:
    """The number of rows of a condition."""
    for value in condition.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    return default
