"""Pictures of samples, paths and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.files import atomic_path

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

COLOURS = ("#3b6fb6", "#d9722e", "#3f9a5b", "#8a5bb0", "#b23a48", "#5b6770")


def to_bytes(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Images in [-1, 1] as bytes; values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def tile(
    images: Float[Tensor, "b c h w"], *, columns: int | None = None, scale: int = 1, gap: int = 1
) -> UInt8[Tensor, "rows columns 3"]:
    """Images side by side as one picture, row by row.

    Args:
        images: in [-1, 1], with 1 or 3 channels (more are cut to the first three).
        columns: images in a row; nearly square by default.
        scale: whole factor by which pixels are enlarged.
        gap: white pixels between images, before enlarging.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pixels = to_bytes(images.detach().cpu().float())
    pixels = pixels.expand(-1, 3, -1, -1) if channels == 1 else pixels[:, :3]
    if channels == 2:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    sheet = torch.full(
        (3, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8
    )
    for index, picture in enumerate(pixels):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = picture
    sheet = sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return sheet.permute(1, 2, 0).contiguous()


def save_images(
    images: Float[Tensor, "b c h w"], path: Path | str, *, columns: int | None = None
) -> Path:
    """Write images as one sheet, small ones enlarged to be seen."""
    from PIL import Image

    scale = max(1, round(64 / max(images.shape[-2:])))
    with atomic_path(path) as temporary:
        Image.fromarray(tile(images, columns=columns, scale=scale).numpy()).save(
            temporary, format="png"
        )
    return Path(path)


def compare_samples(
    panels: Mapping[str, Float[Tensor, "b c h w"]], path: Path | str, *, title: str = ""
) -> Path:
    """Write sheets of images from the same noises side by side, each under its name."""
    plt = _pyplot()
    across = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
    down = math.ceil(len(panels) / across)
    figure, axes = plt.subplots(down, across, figsize=(3.1 * across, 3.5 * down), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, images) in zip(axes.flat, panels.items()):
        scale = max(1, round(32 / images.shape[-1]))
        axis.imshow(tile(images, scale=scale).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=10)
    return _finish(figure, path, title)


def compare_trajectories(
    panels: Mapping[str, Sequence[Float[Tensor, "b *dims"]]],
    path: Path | str,
    *,
    data: Float[Tensor, "n *dims"] | None = None,
    title: str = "",
) -> Path:
    """Draw the paths of the same noises under several models, in one plane.

    The plane is spanned by the two main directions of the data (of the first panel's end points
    without data), so that all panels can be compared.

    Args:
        panels: name to the states along the paths, one tensor a time.
        path: the file.
        data: samples to draw as background.
        title: title of the figure.
    """
    plt = _pyplot()
    ends = next(iter(panels.values()))[-1] if data is None else data
    flat = ends.flatten(1).double().cpu()
    centre = flat.mean(0)
    plane = torch.linalg.svd(flat - centre, full_matrices=False).Vh[:2].T
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4.1), squeeze=False, sharex=True, sharey=True
    )
    for axis, (name, states) in zip(axes.flat, panels.items()):
        lines = torch.stack([(s.flatten(1).double().cpu() - centre) @ plane for s in states])
        if data is not None:
            cloud = (flat - centre) @ plane
            axis.scatter(*cloud.T.numpy(), s=3, color="#cccccc", label="data", zorder=1)
        for line in lines.unbind(1):
            axis.plot(*line.T.numpy(), color=COLOURS[0], alpha=0.55, lw=0.9, zorder=2)
        axis.scatter(*lines[0].T.numpy(), s=7, color=COLOURS[1], label="noise (t = 0)", zorder=3)
        axis.scatter(*lines[-1].T.numpy(), s=7, color=COLOURS[2], label="sample (t = 1)", zorder=3)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("first principal direction")
    axes[0, 0].set_ylabel("second principal direction")
    axes[0, 0].legend(fontsize=7, loc="upper right")
    return _finish(figure, path, title)


def scatter(
    panels: Mapping[str, Float[Tensor, "n 2"]], path: Path | str, *, title: str = ""
) -> Path:
    """Draw points in the plane side by side on equal axes, each cloud under its name."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.1 * len(panels), 3.4), squeeze=False, sharex=True, sharey=True
    )
    for axis, (name, points) in zip(axes.flat, panels.items()):
        axis.scatter(*points.detach().cpu().T.numpy(), s=3, alpha=0.5, color=COLOURS[0], lw=0)
        axis.set_title(name, fontsize=10)
        axis.set_aspect("equal", "box")
        axis.grid(alpha=0.25)
    return _finish(figure, path, title)


STYLES = ("-", "--")
MOST_INSIDE = 7
"""Most entries of a legend that leave room for lines inside a plot."""


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path | str,
    *,
    across: str,
    up: str,
    floor: tuple[str, float] | None = None,
    logarithmic: str = "",
    marked: bool = True,
    title: str = "",
) -> Path:
    """Draw lines `name -> (x values, y values)`, with a dashed floor where one is known.

    Args:
        lines: name to x and y values.
        path: the file.
        across: label of the x axis.
        up: label of the y axis.
        floor: name and value of a dashed line.
        logarithmic: the axes with a logarithmic scale: "", "x", "y" or "xy".
        marked: whether a logarithmic x axis names every x value; not for values that lines do not
            share.
        title: title of the figure.
    """
    figure, axis = _plot(len(lines))
    for index, (colour, (name, (x, y))) in enumerate(zip(_cycle(len(lines)), lines.items())):
        dots = "o" if len(x) <= 20 else None
        axis.plot(x, y, STYLES[index // len(COLOURS) % 2], marker=dots, ms=4, c=colour, label=name)
    values = {value for x, _ in lines.values() for value in x}
    _dress(axis, across, up, floor, logarithmic, sorted(values) if marked else ())
    return _finish(figure, path, title)


def bands(
    lines: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    path: Path | str,
    *,
    across: str,
    up: str,
    floor: tuple[str, float] | None = None,
    logarithmic: str = "",
    title: str = "",
) -> Path:
    """Draw means over seeds with the range of the seeds as a band; see `curves`.

    Args:
        lines: name to (x values, one row of y values a seed); a single x gives a bar with its
            range.
        path: the file.
        across: label of the x axis.
        up: label of the y axis.
        floor: name and value of a dashed line.
        logarithmic: the axes with a logarithmic scale: "", "x", "y" or "xy".
        title: title of the figure.
    """
    figure, axis = _plot(len(lines))
    for colour, (name, (x, rows)) in zip(_cycle(len(lines)), lines.items()):
        values = torch.tensor([list(row) for row in rows], dtype=torch.float64)
        mean, low, high = values.mean(0), values.amin(0), values.amax(0)
        if len(x) == 1:
            reach = torch.stack([mean - low, high - mean]).numpy()
            axis.errorbar(x, mean, reach, fmt="D", ms=5, capsize=4, color=colour, label=name)
            continue
        axis.plot(x, mean, marker="o" if len(x) <= 20 else None, ms=4, color=colour, label=name)
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    marks = sorted({value for x, _ in lines.values() for value in x})
    _dress(axis, across, up, floor, logarithmic, marks)
    return _finish(figure, path, title)


def _dress(
    axis: Any,
    across: str,
    up: str,
    floor: tuple[str, float] | None,
    logarithmic: str,
    marks: Sequence[float],
) -> None:
    """Scales, labels, the floor and the legend of a plot; a logarithmic x axis has the marks."""
    if floor is not None:
        axis.axhline(floor[1], color="#777777", ls="--", lw=1, label=floor[0])
    if "x" in logarithmic:
        axis.set_xscale("log")
        if marks:
            axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
            axis.xaxis.minorticks_off()
    if "y" in logarithmic:
        axis.set_yscale("log")
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    if len(axis.get_legend_handles_labels()[1]) > MOST_INSIDE:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    else:
        # Said aloud, the place costs no warning where the machine is slow to find it.
        axis.legend(fontsize=8, loc="best")
    axis.grid(alpha=0.25)


def _plot(lines: int) -> tuple[Any, Any]:
    """A figure and its axis, with room for a long legend beside it."""
    return _pyplot().subplots(figsize=(6 if lines < MOST_INSIDE else 8.5, 3.8))


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _pyplot() -> Any:
    """Matplotlib's pyplot on a backend that needs no screen."""
    import matplotlib

    matplotlib.use("agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def _finish(figure: Any, path: Path | str, title: str) -> Path:
    plt = _pyplot()
    if title:
        figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format=Path(path).suffix.lstrip(".") or "png")
    plt.close(figure)
    return Path(path)
