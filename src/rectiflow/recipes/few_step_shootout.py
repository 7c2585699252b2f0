"""Few-step shootout: every method of few steps from one teacher, with one budget of training.

A teacher is trained once a seed, its pairs are made once, and every method then gets the same
number of training steps of the same batch size. Methods that take a straightened teacher spend
the first half of their budget on reflow. Flows that are sampled like their teacher have no number
of steps that they are made for, and are judged in one. The comparison page of the first seed lies
in the run folder; `rectiflow run few-step-shootout --resume` goes on with models that are there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rectiflow.distill.comparison_page import compare, write
from rectiflow.distill.few_step_method import Choices, FewStepMethod
from rectiflow.distill.generation import generate_pairs
from rectiflow.distill.methods import METHODS
from rectiflow.files import cache_folder, read_json, write_json
from rectiflow.flows.couplings import Coupling, Independent, StoredPairs
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.premetrics import PseudoHuber
from rectiflow.flows.u_shaped import UShaped
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import new_net, ratios, stage
from rectiflow.training.comparison import Compared, own_steps
from rectiflow.training.data import ImageData, load
from rectiflow.training.evaluation import Evaluator
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.method import Method
from rectiflow.training.progress import Stopwatch
from rectiflow.training.runs import Run
from rectiflow.training.sessions import train_model
from rectiflow.training.trainer import TrainerSettings

CLAIM = (
    "From one teacher and with one budget of training, each method of few steps gives better "
    "samples in the steps it is made for (straightened flows: one) than the teacher in as many."
)
TEACHER = "teacher"
TIMING = "seconds.json"


@dataclass(frozen=True)
class Stage:
    """A method with what it is given."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its own settings, such as the number of phases."""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Times and premetric."""
    fresh: bool = False
    """Whether the student starts from random weights."""


ARMS: Mapping[str, tuple[Stage, ...]] = {
    "reflow": (Stage("reflow"),),
    "reflow, U-shaped times, pseudo-Huber": (
        Stage("reflow", choices={"times": UShaped(), "premetric": PseudoHuber()}),
    ),
    "annealing reflow": (Stage("annealing", fresh=True),),
    "rectified diffusion": (Stage("rectified-diffusion"),),
    "two phases": (Stage("phased", {"phases": 2}),),
    "consistency": (Stage("consistency"),),
    "one-step": (Stage("one-step"),),
    "reflow, then one-step": (Stage("reflow"), Stage("one-step")),
    "reflow, then flow-guided": (Stage("reflow"), Stage("flow-guided")),
    "f-distill": (Stage("f-distill"),),
}


@dataclass(frozen=True)
class Settings:
    """One teacher, one budget."""

    data: str = "digits"
    """Images, by spec string."""
    net: str = "mlp"
    """Network or size preset."""
    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"width": 128, "depth": 1, "time_features": 32}
    )
    """Its arguments."""
    teacher: TrainerSettings = field(default_factory=lambda: stage(2500))
    """Training of the teacher."""
    budget: TrainerSettings = field(default_factory=lambda: stage(1500, learning_rate=5e-4))
    """Training of every method, all its stages together."""
    pairs: int = 8000
    """Pairs for each stage that needs them."""
    teacher_steps: int = 50
    """Euler steps that make them."""
    samples: int = 2000
    """Samples for each score."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 50)
    """Numbers of Euler steps on the comparison page."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Who takes part."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, batches and pairs."""


PRESETS = {
    "quick": Settings(
        net_options={"width": 32, "depth": 1, "time_features": 16},
        teacher=stage(40, batch_size=64),
        budget=stage(8, batch_size=32),
        pairs=256,
        teacher_steps=20,
        samples=200,
        counts=(1, 4),
        seeds=(0,),
    ),
    "default": Settings(),
    "fashion": Settings(
        data="fashion-mnist",
        net="unet-xs",
        net_options={},
        teacher=stage(10_000, batch_size=64),
        budget=stage(6000, batch_size=64, learning_rate=2e-4),
        pairs=20_000,
        samples=5000,
    ),
}


@dataclass(frozen=True)
class Made:
    """A model of one seed.

    Attributes:
        model: the model.
        folder: where it lies.
        seconds: wall time of pairs and training.
    """

    model: FlowModel
    folder: Path
    seconds: float


def run(settings: Settings, run: Run) -> Result:
    """Train the teacher and every method, seed by seed."""
    train, test = load(settings.data), load(settings.data, split="test")
    evaluator = Evaluator(train, test, count=settings.samples, cache=cache_folder())
    scores: dict[str, list[float]] = {name: [] for name in settings.arms}
    pixels: dict[str, list[float]] = {name: [] for name in settings.arms}
    seconds: dict[str, list[float]] = {name: [] for name in settings.arms}
    teachers: dict[str, list[float]] = {name: [] for name in settings.arms}
    places = {seed: run.path(f"seed-{seed}") for seed in settings.seeds}
    for place in () if run.resumed else places.values():
        shutil.rmtree(place, ignore_errors=True)
    for seed, place in places.items():
        made = _train_all(settings, train, place, seed, resume=run.resumed)
        teacher = made[TEACHER].model
        careful: dict[int, float] = {}
        for name in settings.arms:
            steps = judged_steps(made[name].model, teacher)
            straightened = steps != own_steps(made[name].model)
            found = evaluator.score(made[name].model, steps=steps if straightened else None)
            if steps not in careful:
                careful[steps] = evaluator.score(teacher, steps=steps, solver="euler").fd
            scores[name].append(found.fd)
            pixels[name].append(found.fd_pixels or float("nan"))
            seconds[name].append(made[name].seconds)
            teachers[name].append(careful[steps])
        if seed == settings.seeds[0]:
            entries = [Compared(name, str(m.folder), m.model) for name, m in made.items()]
            write(compare(entries, evaluator, settings.counts), entries, evaluator, run)
    counts = {name: _count(judged_steps(made[name].model, teacher)) for name in settings.arms}
    measured = {
        evaluator.name: scores,
        "fd_pixels": pixels,
        f"{evaluator.name} of the teacher": teachers,
        "seconds of pairs and training": seconds,
    }
    return Result(
        slug="few-step-shootout",
        claim=CLAIM,
        numbers=[
            Number(quantity, f"{name}, {counts[name]}", tuple(values))
            for quantity, found in measured.items()
            for name, values in found.items()
        ],
        checks=[
            Check(
                f"{name}: distance over the teacher's in {counts[name]}",
                ratios(scores[name], teachers[name]),
                at_most=0.5,
                broken=1.0,
            )
            for name in settings.arms
        ],
        seeds=settings.seeds,
        notes=[
            f"Every method: {settings.budget.steps} training steps of "
            f"{settings.budget.batch_size} samples in all; a step of f-distill trains two more "
            "networks, and live teachers of phases and consistency cost evaluations beside."
        ],
    )


def judged_steps(model: FlowModel, teacher: FlowModel) -> int:
    """The steps in which a model is judged: its own, or one where it is sampled as its teacher is.

    Example:
        >>> teacher = FlowModel(lambda x, t: x)
        >>> judged_steps(FlowModel(lambda x, t: x), teacher)
        1
    """
    own = own_steps(model)
    return 1 if own == own_steps(teacher) else own


def _trained(
    method: Method, settings: TrainerSettings, folder: Path, *, resume: bool, **told: Any
) -> Made:
    """A trained model with the time that it took, also where it was there already."""
    with Stopwatch() as watch:
        model = train_model(method, settings, folder, resume=resume, **told)
    return Made(model, folder, _first_time(folder / TIMING, watch.seconds, resume))


def _first_time(timing: Path, seconds: float, resume: bool) -> float:
    """The seconds that something took when it was made, kept in a file."""
    if not (resume and timing.is_file()):
        write_json(timing, {"seconds": seconds})
    return float(read_json(timing)["seconds"])


def _train_all(
    settings: Settings, data: ImageData, folder: Path, seed: int, *, resume: bool
) -> dict[str, Made]:
    """The teacher and every arm of one seed."""
    unlabelled = replace(data, labels=None, classes=())
    about = {"name": data.name, "spec": settings.data}
    about.update(size=data.shape[-1], channels=data.shape[0])

    def fresh() -> FlowModel:
        net = new_net(settings.net, seed=seed, shape=data.shape, **settings.net_options)
        return FlowModel(net, shape=data.shape, data=about)

    base = _trained(
        FlowMatching(fresh(), Independent(unlabelled)),
        replace(settings.teacher, seed=seed),
        folder / TEACHER,
        resume=resume,
        entry={"method": "flow", "systems": ["rectified-flow"]},
        title=f"{TEACHER}, seed {seed}",
    )
    teacher, made = base.model, {TEACHER: base}
    stores: dict[str, tuple[Coupling, float]] = {}
    reflowed: dict[str, Made] = {}

    def pairs_of(model: FlowModel, key: str) -> tuple[Coupling, float]:
        if key not in stores:
            with Stopwatch() as clock:
                store = generate_pairs(
                    model,
                    folder / f"pairs of {key}",
                    settings.pairs,
                    solver="euler",
                    steps=settings.teacher_steps,
                    seed=seed,
                    # Pairs of this teacher are kept; only those of an earlier one go.
                    overwrite=True,
                )
            timing = folder / f"pairs of {key}, {TIMING}"
            stores[key] = StoredPairs(store), _first_time(timing, clock.seconds, resume)
        return stores[key]

    for name in settings.arms:
        stages = ARMS[name]
        model, key, spent = teacher, TEACHER, 0.0
        steps = settings.budget.steps // len(stages)
        for index, part in enumerate(stages):
            last = index == len(stages) - 1
            place = folder / (name if last else f"{part.method} in {steps} steps")
            if not last and place.name in reflowed:
                model, key = reflowed[place.name].model, place.name
                spent += reflowed[place.name].seconds
                continue
            entry = METHODS[part.method]
            coupling: Coupling = Independent(unlabelled)
            cost = 0.0
            if entry.pairs:
                coupling, cost = pairs_of(model, key)
            options = entry.options(**part.options)
            student = fresh() if part.fresh else None
            choices = Choices(steps=steps, student=student, options=options, **part.choices)
            done = _trained(
                _method(entry, model, coupling, choices, seed),
                replace(settings.budget, steps=steps, seed=seed),
                place,
                resume=resume,
                entry=entry.entry(options),
                parent=model,
                title=f"{name}, seed {seed}",
            )
            model, key = done.model, place.name
            spent += done.seconds + cost
            if not last:
                reflowed[key] = replace(done, seconds=done.seconds + cost)
        made[name] = Made(model, folder / name, spent)
    return made


def _method(
    entry: FewStepMethod, model: FlowModel, coupling: Coupling, choices: Choices, seed: int
) -> Method:
    """A method; what it draws at first, such as a discriminator, depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry.make(model, coupling, choices)


def _count(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"
