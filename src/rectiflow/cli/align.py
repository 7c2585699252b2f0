"""`rectiflow align`: fine-tune a model toward a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import (
    OutputOptions,
    check_guidance,
    choose_device,
    data_of,
    guided_by,
    plain_warnings,
)
from rectiflow.cli.settings import parse
from rectiflow.errors import positive, unknown
from rectiflow.files import cache_folder, write_json
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.trainer import TrainerSettings

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.flows.couplings import Data
    from rectiflow.flows.fields import FlowModel
    from rectiflow.training.runs import Run

METHODS = ("alignprop", "reinforce")


def _optimizer() -> OptimizerSettings:
    return OptimizerSettings(name="adamw", learning_rate=1e-3, weight_decay=1e-4)


@dataclass(frozen=True)
class Settings(OutputOptions, TrainerSettings):
    """Settings of `rectiflow align`."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """Model folder, or owner/name on the Hub; or the folder of a diffusers pipeline."""
    reward: tuple[str, ...] = ("brightness",)
    """What to raise: brightness[:TARGET], compressibility[:QUALITY], classifier:CLASS|own|+1,
    clip[:MODEL], aesthetic:HEAD[:MODEL], python:MODULE.FUNCTION; several add up, each WEIGHT*REWARD
    if wanted."""
    method: str = "alignprop"
    """alignprop (gradient through the sampler) or reinforce (for rewards without gradient)."""
    truncation: str = "normal"
    """Which last steps carry gradient: normal[:MEAN:STD], uniform[:LOW:HIGH], last:K, full or
    fixed:I."""
    sampling_steps: int | None = None
    """Solver steps of a chain; what the model was made for by default."""
    solver: str | None = None
    """Solver of the chains (alignprop only); the model's own by default."""
    guidance: float | str | None = None
    """Guidance inside the chain (conditional models only): a scale, cfg:4,stop=0.8 or
    apg:7.5,eta=0,momentum=0."""
    lora_rank: int = 4
    """Rank of the adapters; 0 trains all weights."""
    lora_targets: tuple[str, ...] = ()
    """Names, or endings of names, of the layers that get adapters; projections of attention by
    default, or all linear layers of a network without them."""
    keep_adapters: bool = False
    """Also write the adapters alone, as adapters.safetensors."""
    loss_coef: float = 1.0
    """Scale of the reward's loss against the regularisers."""
    target: float | None = None
    """Draw the reward to this value instead of upward."""
    range_penalty: float = 1.0
    """Weight of the penalty on pixels outside [-1, 1] (alignprop only)."""
    drift: float = 0.0
    """Weight of the squared difference of velocities to the model it started from, 0.01 to 0.1 as a
    rule (alignprop only)."""
    checkpoint: bool = True
    """Compute steps again going backward instead of keeping their activations."""
    prompt: tuple[str, ...] = ()
    """Prompts of a pipeline, or texts for the reward clip: one, or one a class."""
    truncate: bool = False
    """Cut prompts that are longer than a tokenizer takes."""
    pipeline: str | None = None
    """Where VAE and text encoders of a trained latent model are, if not where they were."""
    early_stop_reward: tuple[str, ...] = ()
    """A held-out reward: training ends when it falls, and goes back to its best."""
    early_stop_every: int = 10
    """Steps between looks at it."""
    pictures: int = 64
    """Images before and after, from the same noises."""
    steps: int = 100
    """Training steps (optimizer updates)."""
    batch_size: int = 64
    """Images of one micro-batch on one process."""
    ema: float = 0.0
    """Decay of the weight average; 0 keeps the last weights."""
    log_every: int = 1
    """Steps between points of the reward curve."""
    optim: OptimizerSettings = field(default_factory=_optimizer)
    """The optimizer."""

    def __post_init__(self) -> None:
        TrainerSettings.__post_init__(self)
        self.check_output()
        check_guidance(self.guidance)
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        for name in ("early_stop_every", "sampling_steps"):
            value = getattr(self, name)
            if value is not None:
                positive(name, value)
        if self.pictures < 2:
            raise ValueError(f"pictures must be >= 2, got {self.pictures}")
        for name in ("range_penalty", "drift"):
            positive(name, getattr(self, name), zero=True)
        if not self.reward:
            raise ValueError("name a reward, such as --reward brightness")
        own = self.solver is not None or self.drift or self.target is not None
        if self.method == "reinforce" and own:
            raise ValueError(
                "--solver, --drift and --target belong to alignprop: reinforce samples by the sde "
                "solver; leave them out"
            )
        from rectiflow.align.truncation import parse_truncation

        parse_truncation(self.truncation)


@dataclass(frozen=True)
class Subject:
    """A model with what stands between it and its rewards.

    Attributes:
        model: the model, its prompts attached.
        conditions: what its samples are made for.
        decode: from samples to images, for models of latents.
        texts: prompts, or the texts of a reward.
    """

    model: FlowModel
    conditions: Data | None
    decode: Callable[[Tensor], Tensor] | None
    texts: tuple[str, ...]

    def condition(self, count: int) -> dict[str, Any]:
        """The conditions of so many images, in turn."""
        import torch

        from rectiflow.flows.fields import device_of

        if self.conditions is None:
            return {}
        found = self.conditions.condition(torch.arange(count) % len(self.conditions))
        return {name: value.to(device_of(self.model)) for name, value in found.items()}

    def images(self, x: Tensor) -> Tensor:
        """Samples as images."""
        return x if self.decode is None else self.decode(x)


def open_subject(
    source: str, prompts: Sequence[str], pipeline: str | None = None, *, truncate: bool = False
) -> Subject:
    """A model of images with its labels, or one of latents with prompts and decoder.

    Raises:
        ValueError: a model that takes prompts, without any.
        FileNotFoundError: no model there.
    """
    import torch

    from rectiflow.cli.models import attach_prompts, is_latent, open_model
    from rectiflow.flows.couplings import TensorData

    opened = open_model(source, pipeline=pipeline)
    if not is_latent(opened.model):
        classes = int(getattr(opened.model.net, "classes", 0))
        labels = torch.arange(classes)
        conditions = TensorData(labels, {"label": labels}) if classes else None
        return Subject(opened.model, conditions, None, tuple(prompts))
    if not prompts:
        raise ValueError("a pipeline is aligned on prompts: give one or more by --prompt")
    table = attach_prompts(opened, prompts, truncate=truncate)
    opened.pipe.vae.requires_grad_(False)
    return Subject(opened.model, table, opened.images, tuple(prompts))


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="align", summary=COMMANDS["align"].summary)
    with plain_warnings():
        subject = open_subject(
            settings.model, settings.prompt, settings.pipeline, truncate=settings.truncate
        )
        rewards = {"reward": _rewards(settings.reward, subject)}
        if settings.early_stop_reward:
            rewards["held-out reward"] = _rewards(settings.early_stop_reward, subject)
        method = _method(settings, subject, rewards["reward"])
    with settings.open("align", str(subject.model.data.get("name", ""))) as run:
        run.used("alignprop")
        _run(settings, subject, method, rewards, run)
    return 0


def _rewards(specs: Sequence[str], subject: Subject) -> Any:
    from rectiflow.align.rewards import parse_rewards

    def classifier() -> Any:
        from rectiflow.training.evaluation import load_features

        train, test = (data_of(subject.model, split) for split in ("train", "test"))
        features = load_features(train, test, kind="classifier", cache=cache_folder())
        return features.to(choose_device("auto")).net.logits

    return parse_rewards(specs, classifier=classifier, texts=subject.texts)


def _method(settings: Settings, subject: Subject, reward: Any) -> Any:
    """The method that the settings ask for."""
    from rectiflow.align import AlignProp, FieldDrift, RangePenalty, Reinforce, parse_truncation

    guidance = settings.guidance
    if guidance is not None and subject.conditions is None:
        guided_by(subject.model, guidance)  # refuses: there is nothing to guide away from
    shared: dict[str, Any] = {
        "steps": settings.sampling_steps,
        "rank": settings.lora_rank,
        "targets": settings.lora_targets or None,
        "conditions": subject.conditions,
        "guided": None if guidance is None else partial(guided_by, guidance=guidance),
        "decode": subject.decode,
        "seed": settings.seed,
        "checkpoint": settings.checkpoint,
    }
    if settings.method == "reinforce":
        return Reinforce(subject.model, reward, **shared)
    return AlignProp(
        subject.model,
        reward,
        solver=settings.solver,
        truncation=parse_truncation(settings.truncation),
        loss="neg" if settings.target is None else "l1-target",
        target=settings.target,
        coefficient=settings.loss_coef,
        regularizers=[RangePenalty(settings.range_penalty), FieldDrift(settings.drift)],
        **shared,
    )


def _run(settings: Settings, subject: Subject, method: Any, rewards: Any, run: Run) -> None:
    """Train, and leave model, curve, pictures and numbers in the run's folder."""
    import torch

    from rectiflow.align import EarlyStop, RewardCurve, measure
    from rectiflow.align.adapters import merged
    from rectiflow.distill import save_lora
    from rectiflow.distill.lora import AdaptedNet
    from rectiflow.flows.sampling import draw_source, sample
    from rectiflow.training.figures import curves, save_images
    from rectiflow.training.records import read_log
    from rectiflow.training.sessions import MODEL, train_model

    base = subject.model
    source = draw_source(
        base, settings.pictures, generator=torch.Generator().manual_seed(settings.seed)
    )
    condition = subject.condition(settings.pictures)
    look: dict[str, Any] = {
        "steps": settings.sampling_steps, "batch_size": settings.batch_size, **condition,
    }  # fmt: skip

    def score(model: FlowModel) -> dict[str, float]:
        seeded = torch.Generator(source.device).manual_seed(settings.seed)
        return measure(model, rewards, source, decode=subject.decode, generator=seeded, **look)

    file = run.path("rewards.jsonl")
    callbacks: list[Any] = [RewardCurve(method, file, every=settings.log_every)]
    stop = EarlyStop(lambda m: score(m)["held-out reward"], every=settings.early_stop_every)
    if settings.early_stop_reward:
        callbacks.append(stop)
    facts = {"reward": list(settings.reward), "lora_rank": settings.lora_rank}
    if settings.method == "alignprop":
        facts["truncation"] = settings.truncation
    entry = {"method": settings.method, **facts, "systems": ["alignprop"]}
    trained = train_model(
        method,
        settings,
        run.folder,
        entry=entry,
        parent=base,
        title=settings.method,
        resume=settings.resume,
        callbacks=callbacks,
    )
    if not run.main:
        return
    if settings.keep_adapters and isinstance(trained.net, AdaptedNet):
        save_lora(trained, run.path("adapters.safetensors"))
    plain = merged(trained)
    if plain is not trained:
        plain.save_pretrained(run.path(MODEL), overwrite=True)
    numbers = {}
    for name, model in (("before", base), ("after", plain)):
        numbers[name] = score(model)
        with torch.no_grad():
            seeded = torch.Generator(source.device).manual_seed(settings.seed)
            x = sample(model, source=source, generator=seeded, **look)
            save_images(subject.images(x), run.path(f"{name}.png"))
    rows = read_log(file)
    if rows:
        curves(
            {"training samples": ([r["step"] for r in rows], [r["reward"] for r in rows])},
            run.path("rewards.png"),
            across="training step",
            up="mean reward",
        )
    stopped = stop.best[0] if stop.best is not None and stop.stopped else None
    write_json(
        run.path("align.json"),
        {"reward": list(settings.reward), **numbers, "went_back_to_step": stopped, "curve": rows},
    )
    for name, value in numbers["before"].items():
        print(f"{name}: {value:.4g} before, {numbers['after'][name]:.4g} after")
    print(f"model: {run.path(MODEL)}")
