"""InstaFlow: bake a teacher's guidance into pairs, straighten the flow on them, distil it.

Class-conditional digits with a network of 55,000 parameters stand in for Stable Diffusion and its
prompts; `teacher` and `prompts` run the same stages on a diffusers pipeline, judged in its latent
space. What this scale cannot show: that distilling the teacher directly fails. Here it wins.

Source: arXiv 2309.06380, sections 3 and 4 and table 2.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.distill.generation import generate_pairs
from rectiflow.distill.one_step import OneStepDistillation
from rectiflow.distill.text_reflow import TextReflow
from rectiflow.flows.couplings import StoredPairs
from rectiflow.flows.fields import FlowModel, evaluating
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.flows.integration import integrate
from rectiflow.flows.sampling import draw_source
from rectiflow.recipes.guided_tasks import Task, labelled_images, prompted_pipeline
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import numbers, ratios, stage, train
from rectiflow.training.evaluation import Moments, frechet_distance
from rectiflow.training.figures import bands, compare_samples
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.report import cell
from rectiflow.training.runs import Run
from rectiflow.training.trainer import TrainerSettings

CLAIM = (
    "Reflow on the pairs of a guided teacher gives a flow that needs no guidance and few steps, at "
    "half the network's calls; guiding it again leads away from the teacher."
)
TEACHER, REFLOWED, AGAIN = "guided teacher", "reflowed", "reflowed, guided again"
STUDENT, DIRECT = "reflowed and distilled", "distilled directly"
ARMS = (TEACHER, REFLOWED, AGAIN, STUDENT, DIRECT)


@dataclass(frozen=True)
class Settings:
    """The teacher, its pairs and the stages."""

    data: str = "digits"
    """Labelled images, by spec string."""
    teacher: str = ""
    """A pipeline (folder or owner/name) in place of a teacher trained here."""
    prompts: str = ""
    """prompts:FILE for the pipeline."""
    init: str = "reinterpret"
    """How the pipeline's network starts as a flow: reinterpret or analytic."""
    net: str = "mlp"
    """Network or size preset."""
    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"width": 128, "depth": 1, "time_features": 32}
    )
    """Its arguments."""
    flow: TrainerSettings = field(default_factory=lambda: stage(2500))
    """The teacher, with a tenth and a half of its labels dropped."""
    reflow: tuple[TrainerSettings, ...] = field(default_factory=lambda: (stage(1500),))
    """Stages of reflow, one after the other on the same pairs."""
    distil: TrainerSettings = field(default_factory=lambda: stage(500))
    """Distillation of the reflowed flow."""
    direct: TrainerSettings = field(default_factory=lambda: stage(1500))
    """Distillation of the teacher itself."""
    guidance: float = 2.0
    """Guidance of the teacher, baked into its pairs."""
    again: float = 1.5
    """Guidance put on the reflowed flow to see what it does."""
    student_guidance: float = 1.0
    """Guidance of the reflowed flow as the student's teacher."""
    pairs: int = 8000
    """Pairs."""
    pair_steps: int = 25
    """Euler steps of teachers, and of the careful samples."""
    flow_dropout: float = 0.15
    """Share of labels dropped for the teacher."""
    reflow_dropout: float = 0.1
    """Share of conditions dropped in reflow."""
    steps: tuple[int, ...] = (1, 2, 4, 25)
    """Numbers of Euler steps to score."""
    samples: int = 2000
    """Samples of each score."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, batches and pairs."""


def _paper_stage(steps: int, batch_size: int) -> TrainerSettings:
    optim = OptimizerSettings(name="adamw", learning_rate=1e-6, clip_norm=1.0)
    return TrainerSettings(
        steps=steps, batch_size=batch_size, ema=0.9999, optim=optim, precision="bf16"
    )


PRESETS = {
    "quick": Settings(
        net_options={"width": 32, "depth": 1, "time_features": 16},
        flow=stage(60, batch_size=64),
        reflow=(stage(40, batch_size=64),),
        distil=stage(20, batch_size=64),
        direct=stage(40, batch_size=64),
        pairs=256,
        pair_steps=10,
        steps=(1, 2, 10),
        samples=200,
        seeds=(0,),
    ),
    "default": Settings(),
    # The paper's distillation goes on with LPIPS on decoded images; here it is L2 throughout.
    "paper": Settings(
        teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
        prompts="prompts:prompts.txt",
        reflow=(_paper_stage(70_000, 64), _paper_stage(25_000, 1024)),
        distil=_paper_stage(39_500, 1024),
        direct=_paper_stage(39_500, 1024),
        guidance=5.0,
        student_guidance=1.5,
        pairs=1_600_000,
        samples=5000,
        seeds=(0,),
    ),
}


@dataclass(frozen=True)
class Score:
    """One arm of one seed in one number of steps.

    Attributes:
        distance: Fréchet distance to the careful samples of the guided teacher.
        error: mean squared difference to them, noise by noise.
        accuracy: share of samples whose class is the one asked for; NaN without classes.
        calls: network evaluations for a sample.
    """

    distance: float
    error: float
    accuracy: float
    calls: float


def run(settings: Settings, run: Run) -> Result:
    """All arms and seeds, their checks and pictures."""
    if settings.teacher:
        task = prompted_pipeline(settings.teacher, settings.prompts, settings.init)
    else:
        task = labelled_images(
            settings.data, settings.net, settings.net_options, settings.flow, settings.flow_dropout
        )
    arms: dict[str, list[dict[int, Score]]] = {name: [] for name in ARMS}
    shown: dict[str, Tensor] = {}
    for seed in settings.seeds:
        fields = _make(settings, task, seed, run)
        found, images = _score(settings, task, fields)
        for name in ARMS:
            arms[name].append(found[name])
        shown = shown or images
    return Result(
        slug="instaflow",
        claim=CLAIM,
        numbers=_numbers(arms, settings),
        checks=_checks(arms, settings),
        seeds=settings.seeds,
        notes=_notes(arms, settings),
        pictures=_draw(arms, shown, settings, run),
    )


def _make(settings: Settings, task: Task, seed: int, run: Run) -> dict[str, Any]:
    """The fields of all arms for a seed."""
    folder = run.path(f"seed-{seed}")
    teacher = task.teacher(seed)
    guided = ClassifierFreeGuidance(teacher, settings.guidance)
    first = _pairs(settings, task, teacher, guided, folder / "pairs-1", seed * 1000 + 1)
    start = task.start(teacher)
    reflowed = start
    for number, trained in enumerate(settings.reflow, 1):
        method = TextReflow(reflowed, first, condition_dropout=settings.reflow_dropout)
        reflowed = train(method, replace(trained, seed=seed), title=f"reflow, stage {number}")
    own = ClassifierFreeGuidance(reflowed, settings.student_guidance)
    second = _pairs(settings, task, reflowed, own, folder / "pairs-2", seed * 1000 + 2)
    student = train(
        OneStepDistillation(reflowed, second), replace(settings.distil, seed=seed), title="distil"
    )
    direct = train(
        OneStepDistillation(start, first), replace(settings.direct, seed=seed), title="distil first"
    )
    again = ClassifierFreeGuidance(reflowed, settings.again)
    return dict(zip(ARMS, (guided, reflowed, again, student, direct)))


def _pairs(
    settings: Settings, task: Task, model: FlowModel, field: Any, folder: Path, seed: int
) -> StoredPairs:
    store = generate_pairs(
        model,
        folder,
        settings.pairs,
        steps=settings.pair_steps,
        seed=seed,
        conditions=task.data,
        field=field,
        # So many steps are the method's definition of the teacher, not an approximation to check.
        gate=None,
        overwrite=True,
    )
    return StoredPairs(store)


@torch.no_grad()
def _score(
    settings: Settings, task: Task, fields: Mapping[str, Any]
) -> tuple[dict[str, dict[int, Score]], dict[str, Tensor]]:
    """Scores by arm and number of steps, and a few images of one step."""
    model = fields[REFLOWED]
    generator = torch.Generator().manual_seed(1234)
    source = draw_source(model, settings.samples, generator=generator)
    rows = torch.randint(len(task.data), (settings.samples,), generator=generator)
    condition = {name: v.to(source.device) for name, v in task.data.condition(rows).items()}
    careful, _ = _follow(fields[TEACHER], source, settings.pair_steps, condition)
    wanted = Moments.of(task.features(careful))
    scores: dict[str, dict[int, Score]] = {}
    shown = {"guided teacher, careful": careful[:25]}
    for name, field_ in fields.items():
        scores[name] = {}
        for steps in settings.steps[:1] if name in (STUDENT, DIRECT) else settings.steps:
            ends, calls = _follow(field_, source, steps, condition)
            right = float("nan")
            if task.classes is not None:
                right = float((task.classes(ends) == condition["label"]).float().mean())
            found = frechet_distance(Moments.of(task.features(ends)), wanted)
            error = float((ends - careful).square().mean())
            scores[name][steps] = Score(found, error, right, calls)
            if steps == settings.steps[0]:
                shown[f"{name}, {steps} step"] = ends[:25]
    return scores, shown


def _follow(
    field: Any, source: Tensor, steps: int, condition: Mapping[str, Tensor]
) -> tuple[Tensor, float]:
    """Where a field carries noises, and the network evaluations for each."""
    model: Any = field.field if isinstance(field, ClassifierFreeGuidance) else field
    rows = 0

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    handle = model.net.register_forward_pre_hook(count)
    parts = []
    try:
        with evaluating(model):
            for part in torch.arange(len(source)).split(500):
                some = {name: value[part] for name, value in condition.items()}
                parts.append(integrate(field, source[part], steps, "euler", **some))
    finally:
        handle.remove()
    return torch.cat(parts), rows / len(source)


def _numbers(arms: Mapping[str, Sequence[dict[int, Score]]], settings: Settings) -> list[Number]:
    found = []
    for steps in settings.steps:
        present = {n: [s[steps] for s in rows] for n, rows in arms.items() if steps in rows[0]}
        word = f"{steps} step{'s' if steps > 1 else ''}"
        measures: dict[str, Callable[[Score], float]] = {
            f"Fréchet distance to the careful teacher, {word}": lambda s: s.distance,
            f"squared error to the careful teacher, {word}": lambda s: s.error,
            f"network evaluations, {word}": lambda s: s.calls,
        }
        if not settings.teacher:
            measures[f"accuracy, {word}"] = lambda s: s.accuracy
        found += numbers(present, measures)
    return found


def _checks(arms: Mapping[str, Sequence[dict[int, Score]]], settings: Settings) -> list[Check]:
    """The specification's rules; `broken` is its limit of "does not work"."""
    one, two = settings.steps[:2]

    def falls(steps: int) -> tuple[float, ...]:
        return ratios(
            [s[steps].error for s in arms[TEACHER]], [s[steps].error for s in arms[REFLOWED]]
        )

    grows = [
        min(again[n].error / plain[n].error for n in settings.steps)
        for again, plain in zip(arms[AGAIN], arms[REFLOWED])
    ]
    calls = ratios([s[one].calls for s in arms[TEACHER]], [s[one].calls for s in arms[REFLOWED]])
    checks = [
        # "0.7 times the teacher's" is where the claim breaks.
        Check("fall of the error in one step", falls(one), at_least=2, broken=1 / 0.7),
        Check("fall of the error in two steps", falls(two), at_least=2),
        Check("network evaluations, teacher / reflowed", calls, at_least=2),
        Check(
            f"growth of the error by guidance {settings.again:g}, least over steps",
            tuple(grows),
            at_least=2,
            broken=1,
        ),
    ]
    if not settings.teacher:
        right = tuple(s[one].accuracy for s in arms[REFLOWED])
        checks.append(Check("accuracy in one step", right, at_least=0.95))
    return checks


def _notes(arms: Mapping[str, Sequence[dict[int, Score]]], settings: Settings) -> list[str]:
    one = settings.steps[0]
    error = {name: statistics.fmean(s[one].error for s in arms[name]) for name in ARMS}
    better = DIRECT if error[DIRECT] < error[STUDENT] else STUDENT
    return [
        f"In one step the flow {STUDENT} has an error of {cell(error[STUDENT])}, the one {DIRECT} "
        f"{cell(error[DIRECT])}: {better} is nearer to the teacher. The paper's diagnosis, that "
        "direct distillation fails, concerns Stable Diffusion; small nets on smooth couplings do "
        "not show it, and this recipe does not test it.",
        "Pairs are made with the teacher's own number of Euler steps and no gate: they define the "
        "teacher that all arms are compared with.",
        "The same noises and conditions for all arms and seeds.",
    ]


def _draw(
    arms: Mapping[str, Sequence[dict[int, Score]]],
    shown: Mapping[str, Tensor],
    settings: Settings,
    run: Run,
) -> dict[Path, str]:
    """Error over steps, and images of one step."""
    most = max(settings.steps)
    lines = {
        name: (
            [n for n in rows[0] if not (name == TEACHER and n == most)],
            [[s.error for n, s in row.items() if not (name == TEACHER and n == most)]
             for row in rows],
        )
        for name, rows in arms.items()
    }  # fmt: skip
    by_steps = bands(
        lines,
        run.path("error.png"),
        across="Euler steps",
        up="mean squared error to the careful teacher",
        logarithmic="xy",
    )
    one = settings.steps[0]
    means = [statistics.fmean(s[one].error for s in arms[name]) for name in (TEACHER, REFLOWED)]
    pictures = {
        by_steps: f"Distance to the guided teacher's {settings.pair_steps}-step samples, noise by "
        f"noise: in one step {cell(means[0])} by the teacher, {cell(means[1])} reflowed, at half "
        "its evaluations. Band: range of the seeds."
    }
    if not settings.teacher:
        sheet = compare_samples(shown, run.path("samples.png"))
        pictures[sheet] = (
            f"The same noises and labels, seed {settings.seeds[0]}: the careful teacher, and every "
            "arm in one step."
        )
    return pictures
