"""2-rectified flow++: times at both ends, robust losses and a diffusion start for one reflow round.

Digits with a network of 55,000 parameters; the paper's setting is CIFAR-10, AFHQ, FFHQ and ImageNet
at 64 pixels with LPIPS. Here the perceptual loss compares features of a small classifier, another
one than judges the samples.

Source: arXiv 2405.20320, sections 3 and 4, table 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rectiflow import flows
from rectiflow.distill.crossing import crossing_risk
from rectiflow.distill.generation import generate_pairs
from rectiflow.distill.reflow import Reflow
from rectiflow.distill.straightening import Straightening, profile
from rectiflow.files import cache_folder
from rectiflow.flows.adaptive_grid import adaptive_times
from rectiflow.flows.couplings import Draw, Independent, Pairs, StoredPairs
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.pair_store import PairStore
from rectiflow.flows.perceptual import PerceptualHuber
from rectiflow.flows.premetrics import L2, Premetric, PseudoHuber
from rectiflow.flows.sampling import sample
from rectiflow.flows.times import TimeSampler, Uniform
from rectiflow.flows.u_shaped import UShaped
from rectiflow.recipes.diffusion_start import StartSettings, compare_starts
from rectiflow.recipes.recipe import Number, Result
from rectiflow.recipes.rfpp_findings import (
    GRIDS,
    HUBER,
    LOGIT,
    PERCEPTUAL,
    SHAPED,
    UNIFORM,
    Scored,
    Seed,
    all_numbers,
    checks,
    draw,
    notes,
)
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.data import ImageData, load
from rectiflow.training.evaluation import Evaluator, load_features
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.runs import Run
from rectiflow.training.trainer import TrainerSettings

CLAIM = (
    "One round of reflow gives good one-step samples if it looks at both ends of time more often "
    "than at the middle, where on a flow's own pairs little is left to learn; starting from a "
    "diffusion model saves training."
)


@dataclass(frozen=True)
class Settings:
    """The experiment."""

    data: str = "digits"
    """Images, by spec string."""
    net: str = "mlp"
    """Network or size preset."""
    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"width": 128, "depth": 1, "time_features": 32}
    )
    """Its arguments: 54,752 parameters."""
    flow: TrainerSettings = field(default_factory=lambda: stage(2500))
    """The first flow."""
    reflow: TrainerSettings = field(default_factory=lambda: stage(1200))
    """Each reflow, from the same first flow on the same pairs."""
    pairs: int = 8000
    """Pairs."""
    solver_steps: int = 100
    """Euler steps of the pairs and of the teacher's samples."""
    a: float = 4.0
    """How much U-shaped times favour the ends."""
    budgets: tuple[int, ...] = (2, 4, 8, 16)
    """Numbers of Euler steps at which fitted grids are compared with equal steps."""
    start: StartSettings = field(default_factory=StartSettings)
    """The experiment on a diffusion start."""
    samples: int = 2000
    """Samples for each score."""
    features: str = "auto"
    """Features of the distance: auto, or inception:PATH for FID."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, batches and pairs."""


def _paper_stage(steps: int, batch: int) -> TrainerSettings:
    optim = OptimizerSettings(learning_rate=2e-4, warmup=5000)
    return TrainerSettings(
        steps=steps, batch_size=batch, ema=0.9999, optim=optim, checkpoint_every=10_000
    )


PRESETS = {
    "quick": Settings(
        net_options={"width": 32, "depth": 1, "time_features": 16},
        flow=stage(60, batch_size=64),
        reflow=stage(30, batch_size=64),
        pairs=256,
        solver_steps=20,
        budgets=(2, 4),
        start=StartSettings(
            denoise=stage(60, batch_size=64),
            reflow=stage(30, batch_size=64),
            pairs=256,
            looks=3,
        ),
        samples=200,
        seeds=(0,),
    ),
    "default": Settings(),
    "paper": Settings(
        data="hub:cifar10",
        net="unet-cifar10",
        net_options={"dropout": 0.13},
        flow=_paper_stage(800_000, 512),
        reflow=_paper_stage(800_000, 512),
        pairs=1_000_000,
        start=StartSettings(
            denoise=_paper_stage(400_000, 512),
            reflow=_paper_stage(800_000, 512),
            pairs=1_000_000,
            sigma_data=0.5,
        ),
        samples=50_000,
        seeds=(0,),
    ),
}


def arms(
    settings: Settings, perceptual: torch.nn.Module
) -> dict[str, tuple[TimeSampler, Premetric]]:
    """Times and premetric of every arm."""
    shaped = UShaped(settings.a)
    return {
        UNIFORM: (Uniform(), L2()),
        SHAPED: (shaped, L2()),
        HUBER: (shaped, PseudoHuber()),
        PERCEPTUAL: (shaped, PerceptualHuber(perceptual)),
        LOGIT: (flows.LogitNormal(), L2()),
    }


def run(settings: Settings, run: Run) -> Result:
    """Every arm of every seed, the checks and pictures."""
    images, test = (load(settings.data, split=s) for s in ("train", "test"))
    evaluator = Evaluator(
        images, test, count=settings.samples, features=settings.features, cache=cache_folder()
    )
    # Another net than the evaluator's: a loss must not be judged by its own features.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    perceptual = load_features(images, test, cache=cache_folder(), seed=101).to(device).net
    data = replace(images, labels=None, classes=())
    measured = [_seed(settings, data, evaluator, perceptual, seed, run) for seed in settings.seeds]
    name, floor = evaluator.name, evaluator.floor().fd
    return Result(
        slug="rfpp",
        claim=CLAIM,
        numbers=[
            *all_numbers(measured, settings.budgets, settings.solver_steps, name),
            Number(name, "floor: train vs. test", (floor,) * len(settings.seeds)),
        ],
        checks=checks(measured, name),
        seeds=settings.seeds,
        notes=notes(measured, settings.budgets, settings.seeds[0]),
        pictures=draw(measured, settings.budgets, name, floor, run),
    )


def _seed(
    settings: Settings,
    data: ImageData,
    evaluator: Evaluator,
    perceptual: torch.nn.Module,
    seed: int,
    run: Run,
) -> Seed:
    start = new_model(settings.net, data.shape, seed=seed, **settings.net_options)
    coupling = Independent(data)
    first = train(
        FlowMatching(start, coupling), replace(settings.flow, seed=seed), title="first flow"
    )
    options: dict[str, Any] = {"steps": settings.solver_steps, "overwrite": True}
    folder = run.path(f"seed-{seed}")
    store = generate_pairs(first, folder / "pairs", settings.pairs, seed=2 * seed, **options)
    fresh = generate_pairs(first, folder / "fresh", 1024, seed=2 * seed + 1, **options)
    scored, report = {}, None
    for arm, (times, premetric) in arms(settings, perceptual).items():
        second = train(
            Reflow(first, StoredPairs(store), times=times, premetric=premetric),
            replace(settings.reflow, seed=seed),
            title=arm,
        )
        scored[arm] = _score(second, evaluator, fresh)
        if arm == UNIFORM:
            second.lineage = [*first.lineage, {"method": "reflow"}]
            report = _report(first, second, coupling, fresh, settings)
    assert report is not None
    source, _ = evaluator.noises(first)
    many = sample(first, source=source, steps=settings.solver_steps, solver="euler")
    return Seed(
        teacher=evaluator.compare(many).fd,
        arms=scored,
        report=report,
        crossing=crossing_risk(store, generator=torch.Generator().manual_seed(seed)),
        grids=_grids(first, source[:512], settings, seed),
        start=compare_starts(
            settings.start,
            data,
            evaluator,
            lambda: {"name": settings.net, **settings.net_options},
            seed,
            folder / "start",
        ),
    )


def _score(model: FlowModel, evaluator: Evaluator, fresh: PairStore) -> Scored:
    source, _ = evaluator.noises(model)

    def made(steps: int, solver: str = "euler") -> Any:
        return evaluator.compare(sample(model, source=source, steps=steps, solver=solver))

    noise, target, _ = fresh.rows(torch.arange(len(fresh)))
    reached = sample(model, source=noise.to(source), steps=1, solver="euler")
    one = made(1)
    return Scored(
        one=one.fd,
        two=made(2).fd,
        four=made(4).fd,
        again=made(4, "reinterpolate").fd,
        pixels=one.fd_pixels if one.fd_pixels is not None else float("nan"),
        missed=float((reached.cpu() - target).square().mean()),
    )


def _report(
    first: FlowModel, second: FlowModel, coupling: Independent, fresh: PairStore, settings: Settings
) -> Straightening:
    """Both flows on the pairs they are trained for."""
    drawn = coupling.draw(Draw.of(len(fresh), step=10**6, seed=99))
    own = Pairs(*fresh.rows(torch.arange(len(fresh))))
    steps = settings.solver_steps
    return Straightening(profile(first, drawn, steps=steps), profile(second, own, steps=steps))


def _grids(
    model: FlowModel, source: torch.Tensor, settings: Settings, seed: int
) -> dict[str, list[float]]:
    """Distance of few Euler steps from many, as a part of the samples' spread."""
    many = sample(model, source=source, steps=4 * settings.solver_steps, solver="euler")
    spread = float((many - many.mean(0)).square().mean().sqrt())
    found: dict[str, list[float]] = {grid: [] for grid in GRIDS}
    generator = torch.Generator().manual_seed(1000 + seed)
    for budget in settings.budgets:
        fitted = adaptive_times(model, budget, samples=256, generator=generator)
        for name, grid in zip(GRIDS, (budget, fitted)):
            few = sample(model, source=source, steps=grid, solver="euler")
            found[name].append(float((few - many).square().mean().sqrt()) / spread)
    return found
