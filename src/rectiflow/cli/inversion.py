"""What `rectiflow invert` and `rectiflow edit` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.errors import positive

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.cli.models import Opened


@dataclass(frozen=True)
class InversionOptions:
    """How images are read and followed to their noises."""

    out: Path = Path("inverted.png")
    """The picture, a .png; other files of the same name go beside it."""
    steps: int = 15
    """Solver steps each way, of two evaluations with the default solver."""
    solver: str = "rf-solver"
    """rf-solver, rf-solver:THETA, euler, heun, midpoint, rk4 or implicit-midpoint."""
    fit: bool = False
    """Crop, scale and convert images of another size or mode."""
    truncate: bool = False
    """Cut prompts that are longer than a tokenizer takes."""
    pipeline: str | None = None
    """Pipeline with VAE and text encoders of a trained model; the one it was made from by
    default."""
    batch_size: int = 64
    """Images computed together."""
    overwrite: bool = False
    """Write over --out and the files beside it."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def check_inversion(self) -> None:
        """Refuse numbers and names that cannot be."""
        positive("steps", self.steps)
        positive("batch_size", self.batch_size)
        if self.out.suffix != ".png":
            raise ValueError(f"--out must be a .png, got {self.out}")

    def claim(self, *suffixes: str) -> list[Path]:
        """The files to be written, none of which may be there unless told so."""
        files = [self.out.with_suffix(suffix) for suffix in suffixes]
        for file in files:
            if file.exists() and not self.overwrite:
                raise FileExistsError(f"{file} exists: choose another --out or pass --overwrite")
        return files


def grid_of(opened: Opened, steps: int) -> list[float]:
    """The times of so many steps: equal ones, under the shift of a pipeline's scheduler."""
    from rectiflow.flows.integration import uniform_times
    from rectiflow.flows.time_shift import shifted_times

    reading = getattr(opened.model.net, "reading", None)
    if opened.pipe is None or getattr(reading, "kind", "") != "flow":
        return uniform_times(steps)
    config = opened.pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        # Not the stock grid, which spends its last step on the last thousandth of the noise.
        return shifted_times(steps, float(config.get("shift") or 1.0))
    from rectiflow.interop.diffusers import stock_times

    return stock_times(opened.pipe, steps, shape=opened.model.shape)


def conditions(
    opened: Opened, labels: Sequence[int], prompts: Sequence[str], *, truncate: bool
) -> Callable[[Sequence[int], int], dict[str, Any]]:
    """A function from places in the list of labels or prompts, and repeats, to a condition.

    Without labels and prompts the model's null condition is followed.

    Raises:
        ValueError: both, a label or prompts that the model does not take, prompts too long.
    """
    import torch

    from rectiflow.cli.models import attach_prompts
    from rectiflow.cli.options import labels_for

    if labels and prompts:
        raise ValueError("--label and --prompt exclude each other")
    for label in labels:
        labels_for(opened.model, 1, label, None)
    if prompts:
        attach_prompts(opened, prompts, truncate=truncate)
    # An inversion follows the field as it is: guidance 1 where it is an input of the network.
    built_in = "guidance" in getattr(opened.model.net, "defaults", {})

    def condition(places: Sequence[int], repeats: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if labels:
            found["label"] = torch.tensor([labels[place] for place in places] * repeats)
        if prompts:
            found["prompt"] = torch.tensor(list(places) * repeats)
        if built_in:
            found["guidance"] = torch.ones(len(places) * repeats)
        return {name: value.to(opened.device) for name, value in found.items()}

    return condition


def finite(images: Tensor, what: str) -> Tensor:
    """The images on the CPU as float32.

    Raises:
        ValueError: NaN or infinity among them.
    """
    if not images.isfinite().all():
        raise ValueError(f"the {what} is not finite: take more steps or another solver")
    return images.detach().float().cpu()


def distances(images: Tensor, others: Tensor) -> list[float]:
    """Root mean square differences of images in [-1, 1], clipped as pictures are."""
    gap = images.clamp(-1, 1) - others.clamp(-1, 1)
    return [round(float(one), 6) for one in gap.square().flatten(1).mean(1).sqrt()]
