"""Pixel-wise gradient clipping: textures trained through an encoder whose backward pass has spikes.

A texture is found again from noisy directions in the latent space of a small frozen autoencoder. In
the stressed variant a hundredth of the pixels of a view get fifty times their gradient, as the
paper finds of the encoder of SDXL. All arms that are judged take as many tuning runs. The paper
judges textures of meshes under SDXL by eye.

Source: arXiv 2310.12474, sections 3 and 4.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.texture_lab import Arm, Lab, Painted, paint, train_autoencoder
from rectiflow.recipes.tools import numbers
from rectiflow.training.data import load
from rectiflow.training.figures import bands, compare_samples
from rectiflow.training.progress import bar
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

CLAIM = (
    "Bounding the gradient of each pixel, direction kept, finds better textures through an encoder "
    "with outliers in its backward pass than no bound or one on the whole gradient, and costs "
    "little where there are none."
)
PIXEL = "each pixel, largest channel"
ARMS = {
    "no bound": Arm(),
    "each number": Arm("value"),
    "whole gradient": Arm("global-norm"),
    "each latent": Arm("pixel", latent=True),
    PIXEL: Arm("pixel"),
    "each pixel, 2-norm": Arm("pixel", "l2"),
}
STRESSED, CALM = "with spikes", "without spikes"
JUDGED = (PIXEL, "no bound")
"""The arms that are judged, and so tuned, without spikes too."""


@dataclass(frozen=True)
class Settings:
    """One experiment."""

    data: str = "photos"
    """Colour images, by spec string."""
    side: int = 64
    """Side of a texture in pixels."""
    view: int = 32
    """Side of a view."""
    views: int = 8
    """Views a step."""
    encoder_steps: int = 500
    """Steps of the autoencoder's training."""
    steps: int = 400
    """Steps of a texture's training."""
    noise: float = 0.3
    """Noise in the direction of latents."""
    share: float = 0.01
    """Share of the pixels with spikes."""
    gain: float = 50.0
    """Size of the spikes."""
    rates: tuple[float, float] = (0.003, 0.1)
    """Lowest and highest learning rate tried; without a bound, the lowest is `gain` times less."""
    factors: tuple[float, ...] = (0.5, 2.0, 8.0, 32.0)
    """Bounds tried, in medians of what they bound; as many rates are tried with each."""
    tuning_seeds: tuple[int, ...] = (100,)
    """Seeds that choose rate and bound."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of target, views and noise."""


PRESETS = {
    "quick": Settings(
        data="digits",
        side=16,
        view=8,
        views=2,
        encoder_steps=10,
        steps=4,
        share=0.05,
        rates=(0.01, 0.1),
        factors=(2.0, 8.0),
        seeds=(0,),
    ),
    "default": Settings(),
    # The resolution of the paper's latents; its encoder, diffusion model and meshes are not ours.
    "paper": Settings(side=512, view=128, encoder_steps=20_000, steps=1200),
}

Arms = Mapping[str, Sequence[Painted]]


def run(settings: Settings, run: Run) -> Result:
    """All arms in both variants, tuned alike where they are judged."""
    lab = _lab(settings)
    found: dict[str, Arms] = {}
    best: dict[str, tuple[float, float]] = {}
    chosen = []
    for variant in (STRESSED, CALM):
        arms = {}
        for name, arm in ARMS.items():
            kept = best[name] if variant == CALM and name not in JUDGED else None
            best[name], arms[name] = _tuned(
                lab, arm, settings, variant, f"{variant}, {name}", kept=kept
            )
            rate, factor = best[name]
            bound = "" if arm.suppression == "none" else f", bound {factor:g}"
            chosen.append(f"{variant}, {name}: rate {rate:.2g}{bound}")
        found[variant] = arms
    return Result(
        slug="pixelwise-clipping",
        claim=CLAIM,
        numbers=[number for variant in found for number in _numbers(variant, found[variant])],
        checks=_checks(found),
        seeds=settings.seeds,
        notes=[
            f"Each arm was tuned on {len(settings.factors) ** 2} settings and "
            f"{len(settings.tuning_seeds)} other seed: "
            f"{len(settings.factors)} rates by {len(settings.factors)} bounds (in medians of the "
            "first gradients), without a bound as many rates. The arms that are judged "
            f"{CALM} were tuned there anew; the others keep what they had {STRESSED}.",
            *chosen,
        ],
        pictures=_draw(found, lab, settings, run),
    )


def _lab(settings: Settings) -> Lab:
    train, test = (
        load(settings.data, split=split, size=settings.side, channels=3)
        for split in ("train", "test")
    )
    images = train.batch(range(min(len(train), 2000)))[:, :, : settings.view, : settings.view]
    # Some far apart: neighbours are of one photograph or class.
    targets = test.batch(range(0, len(test), max(1, len(test) // 8)))
    encoder = train_autoencoder(images, steps=settings.encoder_steps)
    return Lab(
        encoder, targets, settings.view, settings.views, settings.noise, settings.share,
        settings.gain, settings.steps,
    )  # fmt: skip


def _tuned(
    lab: Lab,
    arm: Arm,
    settings: Settings,
    variant: str,
    title: str,
    *,
    kept: tuple[float, float] | None = None,
) -> tuple[tuple[float, float], list[Painted]]:
    """Rate and bound of the best mean PSNR on the tuning seeds, and the textures they give.

    With a choice that is kept nothing is tried.
    """
    low, high = settings.rates
    count = len(settings.factors)
    if kept is not None:
        tried = [kept]
    elif arm.suppression == "none":
        tried = [(rate, 1.0) for rate in _spaced(low / settings.gain, high, count**2)]
    else:
        tried = list(itertools.product(_spaced(low, high, count), settings.factors))
    trying = len(tried) * len(settings.tuning_seeds) if len(tried) > 1 else 0
    trainings = trying + len(settings.seeds)
    with bar(title, trainings, unit="trainings") as progress:

        def painted(choice: tuple[float, float], seed: int) -> Painted:
            rate, factor = choice
            stressed = variant == STRESSED
            found = paint(lab, arm, rate=rate, factor=factor, stressed=stressed, seed=seed)
            progress.update(progress.done + 1)
            return found

        def score(choice: tuple[float, float]) -> float:
            return statistics.fmean(painted(choice, seed).psnr for seed in settings.tuning_seeds)

        best = max(tried, key=score) if trying else tried[0]
        return best, [painted(best, seed) for seed in settings.seeds]


def _spaced(low: float, high: float, count: int) -> list[float]:
    """Numbers from low to high, even in the logarithm."""
    return [low * (high / low) ** (place / (count - 1)) for place in range(count)]


def _numbers(variant: str, arms: Arms) -> list[Number]:
    return numbers(
        arms,
        {
            f"{variant}: PSNR, dB": lambda one: one.psnr,
            f"{variant}: variance of the Laplacian / the target's": lambda one: one.roughness,
            f"{variant}: longest gradient of a pixel, median step": lambda one: statistics.median(
                one.largest
            ),
            f"{variant}: share of pixels or latents bounded": lambda one: one.clipped,
            f"{variant}: colour of bounded gradients turned, degrees": lambda one: one.turned,
        },
    )


def _gains(arms: Arms, other: str) -> tuple[float, ...]:
    """PSNR of the method above another arm's, seed by seed."""
    return tuple(a.psnr - b.psnr for a, b in zip(arms[PIXEL], arms[other]))


def _checks(found: Mapping[str, Arms]) -> list[Check]:
    """The specification's rules: no gain over a bound on the whole is a failure."""
    return [
        Check(
            f"{STRESSED}: PSNR above no bound, dB",
            _gains(found[STRESSED], "no bound"),
            at_least=3.0,
            broken=0.05,
        ),
        Check(
            f"{STRESSED}: PSNR above a bound on the whole gradient, dB",
            _gains(found[STRESSED], "whole gradient"),
            at_least=1.5,
            broken=0.05,
        ),
        Check(
            f"{CALM}: PSNR above no bound, dB",
            _gains(found[CALM], "no bound"),
            at_least=-1.0,
        ),
    ]


def _draw(found: Mapping[str, Arms], lab: Lab, settings: Settings, run: Run) -> dict[Path, str]:
    """Textures, and the PSNR of every arm."""
    target = lab.targets[settings.seeds[0] % len(lab.targets)]
    textures = compare_samples(
        {
            "target": target[None],
            **{arm: painted[0].texture[None] for arm, painted in found[STRESSED].items()},
        },
        run.path("textures.png"),
    )
    scores = {
        variant: {arm: [one.psnr for one in painted] for arm, painted in arms.items()}
        for variant, arms in found.items()
    }
    lines = {
        arm: (
            range(len(scores)),
            [[scores[variant][arm][place] for variant in scores] for place in range(len(seeds))],
        )
        for arm, seeds in scores[STRESSED].items()
    }
    plotted = bands(
        lines, run.path("psnr.png"), across="0: with spikes, 1: without", up="PSNR in dB"
    )
    best = {variant: max(arms, key=lambda a: torch.tensor(arms[a]).mean()) for variant, arms in
            scores.items()}  # fmt: skip
    return {
        textures: f"Textures trained {STRESSED}, seed {settings.seeds[0]}.",
        plotted: "PSNR of the textures, mean and range of the seeds. Best "
        + "; best ".join(
            f"{variant}: {arm} ({cell(statistics.fmean(scores[variant][arm]))} dB)"
            for variant, arm in best.items()
        )
        + ".",
    }
