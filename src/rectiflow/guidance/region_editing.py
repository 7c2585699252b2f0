"""Editing part of a picture from noise, without inverting it: steering keeps the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from rectiflow.errors import positive, unknown
from rectiflow.flows.fields import evaluating
from rectiflow.flows.guided import Guided, refuse_memory
from rectiflow.flows.integration import integrate, time_grid
from rectiflow.flows.sampling import draw_source
from rectiflow.guidance.costs import Masked
from rectiflow.guidance.flowchef import FlowChef

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.flows.fields import Field, FlowModel
    from rectiflow.flows.integration import Step


@dataclass(frozen=True, eq=False)
class RegionalField(Guided):
    """A field guided away from a second condition, but only where the picture is edited.

    `v = v_edit + (1 - keep) scale (v_edit - v_source)`: where `keep` is 1 it is the field under
    the condition it is called with, elsewhere that of guidance scale `1 + scale`. Each call is two
    of the field.

    Args:
        field: the conditional field.
        source: the condition to go away from, such as the picture's own prompt or the null one;
            tensors have one row for all samples or one each.
        keep: 1 where the picture is kept; broadcasts with a sample.
        scale: strength, >= 0.

    Raises:
        ValueError: a negative scale, or a field with momentum.

    Source: arXiv 2412.00100, section on editing.
    """

    field: Field
    source: Mapping[str, Any]
    keep: Tensor
    scale: float

    def __post_init__(self) -> None:
        positive("scale", self.scale, zero=True)
        refuse_memory(self.field, "both conditions take two calls at one time")

    def source_velocity(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b *dims"]:
        """What the field says under the condition to go away from."""
        return self._under_source("velocity", x, t)

    def _guide(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        edited = getattr(self.field, view)(x, t, **condition)
        if not self.scale:
            return edited
        weight = self.scale * (1 - self.keep.to(x))
        return edited + weight * (edited - self._under_source(view, x, t))

    def _under_source(self, view: str, x: Tensor, t: Tensor) -> Tensor:
        rows = {
            name: value.expand(x.shape[0], *value.shape[1:])
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1
            else value
            for name, value in self.source.items()
        }
        return getattr(self.field, view)(x, t, **rows)


@torch.no_grad()
def edit_region(
    model: FlowModel,
    reference: Float[Tensor, "b *dims"],
    keep: Float[Tensor, "*mask"],
    *,
    condition: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    source_steps: int | None = None,
    steps: int | Sequence[float] = 50,
    solver: Any = "euler",
    step_size: float = 0.1,
    inner: int = 1,
    estimate: str = "combined",
    noise: Float[Tensor, "b *dims"] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Float[Tensor, "b *dims"]:
    """Pictures that equal the reference where it is kept and follow a new condition elsewhere.

    Sampling starts from noise. In the first `source_steps` steps the whole picture is pulled to
    the reference, so that the region takes up its layout; afterwards only what is kept.

    Args:
        model: the model.
        reference: the pictures, or their latents (`interop.diffusers.encode_images`).
        keep: 1 where the reference is kept, 0 where it is edited; see `latent_mask` for latents.
        condition: the condition of the edit, one row a picture.
        source: what guidance goes away from inside the region; no guidance without it.
        scale: its strength.
        source_steps: steps in which everything is pulled to the reference; fewer than are steered
            at all, which are those that end before time 1. By default 10, but at most half of
            these.
        steps: number of steps or grid of times.
        solver: see `integrate`.
        step_size: see `FlowChef`.
        inner: see `FlowChef`.
        estimate: velocity from which the data are estimated: `combined`, or `source` (one more
            call a step).
        noise: the noises to start from; drawn from `generator` otherwise.
        generator: the source of randomness.
        progress: called with the number of steps done.

    Raises:
        ValueError: a mask of another size, one that keeps nothing or everything; noises of
            another shape; `estimate="source"` without a source; so many source steps that no step
            is left for the mask.
        SteeringDivergedError: the step size is too large.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> model = FlowModel(lambda x, t: 0 * x, shape=(1, 1, 2))
        >>> kept = torch.tensor([[1.0, 0.0]])
        >>> found = edit_region(model, torch.ones(1, 1, 1, 2), kept, source_steps=0, step_size=0.5)
        >>> found[0, 0, 0, 0].item()
        1.0

    Source: arXiv 2412.00100, editing without inversion.
    """
    if estimate not in ("combined", "source"):
        raise unknown("estimate", estimate, ("combined", "source"))
    if estimate == "source" and source is None:
        raise ValueError("estimate='source' needs source=: the condition of the reference")
    whole = Masked(reference, torch.ones_like(keep))
    if float(keep.max()) == 0 or float(keep.min()) == 1:
        extent = "nothing" if float(keep.max()) == 0 else "everything"
        raise ValueError(f"the mask keeps {extent}: mark what to keep with 1 and the rest with 0")
    steered = sum(time < 1 for time in time_grid(steps)[1:])
    if source_steps is None:
        source_steps = min(10, steered // 2)
    if source_steps >= max(steered, 1):
        raise ValueError(
            f"source_steps must be below {steered}, the number of steps that end before time 1, "
            f"got {source_steps}: the mask would never be used"
        )
    if noise is None:
        noise = draw_source(model, reference.shape[0], generator=generator)
    if noise.shape != reference.shape:
        raise ValueError(
            f"the reference has shape {tuple(reference.shape)} but the noises have "
            f"{tuple(noise.shape)}: bring it to the model's size"
        )
    field = model if source is None else RegionalField(model, source, keep, scale)
    velocity = _from_source if estimate == "source" else None
    settings: dict[str, Any] = {"step_size": step_size, "inner": inner, "velocity": velocity}
    correctors = (
        FlowChef(whole, max_steps=source_steps, **settings),
        FlowChef(Masked(reference, keep), first_step=source_steps, **settings),
    )

    def counted(step: Step) -> Tensor:
        if progress is not None:
            progress(step.index + 1)
        return step.after

    with evaluating(model):
        return integrate(
            field,
            model.path.start(noise),
            steps,
            solver,
            correctors=(*correctors, counted),
            generator=generator,
            **(condition or {}),
        )


def _from_source(step: Step) -> Tensor:
    """The velocity of a regional field under its source condition, at the beginning of a step."""
    x = step.before
    dtype = torch.promote_types(x.dtype, torch.float32)
    return step.field.source_velocity(x, x.new_full((x.shape[0],), step.time, dtype=dtype))


def latent_mask(keep: Float[Tensor, "h w"], sides: Sequence[int]) -> Float[Tensor, "y x"]:
    """A mask on the grid of latents: a cell is kept only if all its pixels are.

    Args:
        keep: 1 where the picture is kept.
        sides: height and width of the latents, which divide those of the picture.

    Raises:
        ValueError: sides that do not divide those of the mask.

    Example:
        >>> latent_mask(torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2), (1, 2))
        tensor([[1., 0.]])
    """
    rows, columns = sides
    if keep.shape[0] % rows or keep.shape[1] % columns:
        raise ValueError(
            f"the mask is {keep.shape[0]}x{keep.shape[1]}, which is no multiple of the latents' "
            f"{rows}x{columns}: give a mask of the picture's size"
        )
    cell = (keep.shape[0] // rows, keep.shape[1] // columns)
    return -functional.max_pool2d(-keep[None, None], cell)[0, 0]
