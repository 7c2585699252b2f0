"""Inverse problems by name: their degradations, and what it costs to miss a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.cli.models import Opened
    from rectiflow.guidance import Cost
    from rectiflow.images.degradations import Degradation

TASKS = ("inpaint", "sr", "deblur", "colour")


def default_degradation(task: str, shape: tuple[int, int, int]) -> str:
    """The degradation of a task where none is named, in words.

    Example:
        >>> default_degradation("inpaint", (1, 8, 8)), default_degradation("deblur", (3, 64, 64))
        ('box:4', 'blur:11:1')
    """
    small = min(shape[1:]) < 32
    words = {
        "inpaint": f"box:{max(1, min(shape[1:]) // (2 if small else 3))}",
        "sr": "downscale:2" if small else "downscale:4",
        "deblur": "blur:5:1" if small else "blur:11:1",
        "colour": "grey",
    }
    if task not in words:
        raise unknown("task", task, words)
    return words[task]


def degradation_of(
    task: str, shape: tuple[int, int, int], *, mask: Path | None = None, named: str | None = None
) -> tuple[str, Degradation]:
    """The degradation of a task for images of a shape, and its words.

    Raises:
        ValueError: a mask for a task other than inpaint, or with a degradation; a mask of another
            size, or one that keeps nothing or everything; a degradation the images cannot take.
    """
    from rectiflow.images import degradations

    default = default_degradation(task, shape)
    if mask is None:
        words = default if named is None else named
        return words, degradations.build(words, shape)
    if task != "inpaint" or named is not None:
        raise ValueError("--mask is for --task inpaint without --degradation")
    operator = degradations.Mask(degradations.read_mask(mask))
    operator.shape(shape)
    return f"mask:{mask}", operator


def cost_of(opened: Opened, operator: Degradation, measured: Tensor) -> Cost:
    """How far samples of a model are from a measurement of their images.

    A model of latents is compared in latents where pixels are kept or lost, and through its
    decoder otherwise.

    Raises:
        ValueError: a mask that keeps no whole cell of the latents.
    """
    from rectiflow.guidance import Custom, Decoded, LinearInverse, Masked, latent_mask
    from rectiflow.images.degradations import LinearOperator, Mask

    if opened.pipe is not None and isinstance(operator, Mask) and operator.keep.shape[0] == 1:
        reference = opened.latents(measured)
        keep = latent_mask(operator.keep[0], reference.shape[2:])
        if not keep.any():
            side = operator.keep.shape[-1] // keep.shape[-1]
            raise ValueError(
                f"the mask keeps no whole cell of the latents, which are {side}x{side} pixels: "
                "keep larger areas"
            )
        return Masked(reference, keep)
    cost: Any
    if isinstance(operator, LinearOperator):
        cost = LinearInverse(operator, measured)
    else:
        cost = Custom(lambda x: (operator.A(x) - measured.to(x)).square().flatten(1).sum(1))
    return cost if opened.pipe is None else Decoded(cost, opened.images)


def picture_of(measured: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A measurement as pictures of the model's size, to be looked at."""
    from torch.nn import functional

    shown = measured.expand(-1, shape[0], -1, -1) if measured.shape[1] == 1 else measured
    return functional.interpolate(shown.float(), tuple(shape[1:]), mode="nearest")
