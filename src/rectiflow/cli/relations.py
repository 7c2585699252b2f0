"""`rectiflow relations`: teach a text-to-image model who does what to whom."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import (
    OutputOptions,
    check_guidance,
    counting,
    guided_by,
    plain_warnings,
)
from rectiflow.cli.settings import parse
from rectiflow.errors import positive

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.cli.models import Opened
    from rectiflow.guidance import (
        ConditionRectifier,
        RelationFitting,
        RelationPrompts,
        RelationShifts,
        RelationTexts,
    )
    from rectiflow.training.runs import Run

RECTIFIER = "rectifier"
SPACES = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}
LOOKED_AT = 8
"""Pairs by which the contrast of prompts is measured."""


@dataclass(frozen=True)
class Settings(OutputOptions):
    """Settings of `rectiflow relations`."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """Folder of a diffusers pipeline with CLIP text encoders (Stable Diffusion 1.x, 2.x, XL, 3) or
    a model trained from one, or owner/name on the Hub."""
    relation_dir: Path | None = None
    """Folder of a relation: index.json with the words A, R, B and the prompts ARB, BRA, and
    pictures in the folders ARB, BRA, A and B."""
    rectifier: Path | None = None
    """A rectifier that was fitted before, to apply as it is in place of --relation-dir."""
    iters: int = 100
    """Iterations, of five optimizer steps each."""
    lr: float = 3e-4
    """Learning rate of AdamW."""
    batch_size: int = 1
    """Pairs of pictures in a step."""
    hidden: int = 512
    """Width of the graph network."""
    lambda_pos: float = 10.0
    """Weight of each prompt's loss on its own picture."""
    lambda_neg: float = 2.0
    """Weight of what is taken off for its loss on the other's picture."""
    hinge: float | None = None
    """Push exchanged pictures away only until their loss is larger by this."""
    cap: float | None = None
    """Longest shift, as a part of the vector that is shifted."""
    early_stop_every: int | None = None
    """Iterations between looks at the contrast of the prompts: fitting ends when it falls, and goes
    back to its best."""
    importance: bool = True
    """Look at noise more often than at data."""
    w: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    """Weights of the shift, a column of pictures each; 0 is the model as it was."""
    heldout_objects: tuple[str, ...] = ()
    """Other objects for the relation, in pairs A B, that it was not fitted on."""
    object_prompt: str = "this is a photo of {}"
    """The prompt about one object."""
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = "auto"
    """What a diffusion network predicts; what its scheduler says by default."""
    guidance: float | str | None = 7.5
    """Guidance of the pictures, as in rectiflow sample."""
    pictures: int = 4
    """Pictures of each prompt, from the same noises for all prompts and weights."""
    sampling_steps: int | None = None
    """Solver steps of the pictures; what the model was made for by default."""
    solver: str | None = None
    """Solver of the pictures; the model's own by default."""
    fit: bool = False
    """Crop, scale and convert pictures of another size or mode."""
    truncate: bool = False
    """Cut prompts that are longer than a tokenizer takes."""
    pipeline: str | None = None
    """Where VAE and text encoders of a trained model are, if not where they were."""
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints."""
    seed: int = 0
    """Seed of first weights, noises and times."""

    def __post_init__(self) -> None:
        self.check_output()
        for name in ("iters", "lr", "batch_size", "hidden", "pictures", "checkpoint_every"):
            positive(name, getattr(self, name))
        for name in ("early_stop_every", "sampling_steps"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if not self.w:
            raise ValueError("--w needs one or more weights, such as 0 0.4 0.8")
        for weight in self.w:
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"--w must be finite and >= 0, got {weight}")
        if (self.relation_dir is None) == (self.rectifier is None):
            raise ValueError(
                "give --relation-dir to fit a rectifier, or --rectifier to apply one that is there"
            )
        if len(self.heldout_objects) % 2:
            raise ValueError(
                f"--heldout-objects come in pairs A B, got {len(self.heldout_objects)} of them"
            )
        check_guidance(self.guidance)
        self.loss()

    def loss(self, space: str | None = None) -> Any:
        """The loss of fitting."""
        from rectiflow.guidance import PairContrastiveDenoising

        return PairContrastiveDenoising(
            self.lambda_pos, self.lambda_neg, self.hinge, self.cap, space
        )


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="relations", summary=COMMANDS["relations"].summary)
    import torch

    from rectiflow.guidance import encode_relation

    with plain_warnings():
        opened = _open(settings)
        if settings.guidance is not None:
            guided_by(opened.model, settings.guidance)  # refuses what cannot guide it
        rectifier, texts, method = _begin(settings, opened)
        pairs = zip(settings.heldout_objects[::2], settings.heldout_objects[1::2])
        relations = [
            (one, encode_relation(opened.pipe, one, truncate=settings.truncate))
            for one in (texts, *(texts.with_objects(a, b) for a, b in pairs))
        ]
        with torch.no_grad():
            rectifier.shifts(relations[0][1])  # refuses vectors of another encoder
    with settings.open("relations") as run:
        run.used("rrnet")
        record: dict[str, Any] = {}
        if method is not None:
            rectifier, record = _fit(settings, method, run)
        if run.main:
            _apply(settings, opened, rectifier, relations, record, run)
    return 0


def _open(settings: Settings) -> Opened:
    """The model with its pipeline, its network read as it was asked for."""
    from rectiflow.cli.models import is_latent, is_pipeline, open_model

    opened = open_model(settings.model, pipeline=settings.pipeline)
    if not is_latent(opened.model):
        takes = "class labels" if opened.model.conditional else "no condition"
        raise ValueError(
            f"relations are between words and the model takes {takes}: give a diffusers pipeline "
            "with a CLIP text encoder"
        )
    if settings.prediction_type != "auto":
        from rectiflow.interop.diffusers import from_pipeline
        from rectiflow.interop.diffusers.scheduling import is_flow

        scheduler = opened.pipe.scheduler
        if is_flow(scheduler) or not is_pipeline(settings.model):
            raise ValueError(
                "--prediction-type is for pipelines of diffusion models, and this is a flow or a "
                "trained model: leave it out"
            )
        opened.pipe.scheduler = type(scheduler).from_config(
            scheduler.config, prediction_type=settings.prediction_type
        )
        opened.model = from_pipeline(opened.pipe).to(opened.device)
    return opened


def _begin(
    settings: Settings, opened: Opened
) -> tuple[ConditionRectifier, RelationTexts, RelationFitting | None]:
    """The rectifier, its relation, and how it is fitted if it is to be."""
    import torch

    from rectiflow.cli.relation_folder import read_pictures, read_texts
    from rectiflow.flows import TowardNoise, Uniform
    from rectiflow.guidance import (
        ConditionRectifier,
        RelationalGraphAttention,
        RelationExamples,
        RelationFitting,
        RelationTexts,
        encode_relation,
    )
    from rectiflow.interop.diffusers import clip_of

    if settings.rectifier is not None:
        found = ConditionRectifier.from_pretrained(settings.rectifier).to(opened.device)
        try:
            return found, RelationTexts(**found.about["texts"]), None
        except (KeyError, TypeError):
            raise ValueError(
                f"{settings.rectifier} does not say which relation it was fitted on: give one "
                "that this command wrote"
            ) from None
    assert settings.relation_dir is not None
    texts = read_texts(settings.relation_dir, alone=settings.object_prompt)
    prompts = encode_relation(opened.pipe, texts, truncate=settings.truncate)
    pictures = read_pictures(settings.relation_dir, opened, fit=settings.fit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = RelationalGraphAttention(clip_of(opened.pipe).width, hidden=settings.hidden)
    about = {"texts": texts.facts(), "pipeline": opened.model.data["pipeline"]}
    method = RelationFitting(
        opened.model,
        ConditionRectifier(net, about=about),
        RelationExamples(prompts, pictures),
        settings.loss(_space(opened)),
        times=TowardNoise() if settings.importance else Uniform(),
    )
    return method.rectifier, texts, method


def _space(opened: Opened) -> str | None:
    """In what the network's training measured its errors, where the model was turned from it."""
    from rectiflow.interop.diffusers import PipelineNet

    net = next(part for part in opened.model.net.modules() if isinstance(part, PipelineNet))
    return SPACES[net.reading.output] if net.reading.kind == "table" else None


def _fit(
    settings: Settings, method: RelationFitting, run: Run
) -> tuple[ConditionRectifier, dict[str, Any]]:
    """The fitted rectifier, written, and what there is to say about its training."""
    from rectiflow.align import EarlyStop
    from rectiflow.guidance import ConditionRectifier, fit_relation
    from rectiflow.training import OptimizerSettings, TrainerSettings
    from rectiflow.training.records import read_log

    target = run.path(RECTIFIER)
    if settings.resume and target.is_dir():
        return ConditionRectifier.from_pretrained(target), {}
    if run.main:
        shutil.rmtree(target, ignore_errors=True)

    def contrast(model: object = None) -> float:
        # Seeds of the noises that training does not draw.
        return method.contrast(LOOKED_AT, seed=settings.seed + 10_000)

    before, each = contrast(), len(method.pairings)
    looks = settings.early_stop_every
    stop = None if looks is None else EarlyStop(contrast, every=each * looks)
    trained = fit_relation(
        method,
        TrainerSettings(
            steps=each * settings.iters,
            batch_size=settings.batch_size,
            ema=0.0,
            seed=settings.seed,
            checkpoint_every=settings.checkpoint_every,
            log_every=each,
            optim=OptimizerSettings("adamw", settings.lr, weight_decay=0.01, clip_norm=0.0),
        ),
        folder=run.folder,
        resume=settings.resume,
        callbacks=() if stop is None else (stop,),
    ).eval()
    if run.main:
        trained.save_pretrained(target, overwrite=True)
    back = stop.best if stop is not None and stop.stopped else None
    return trained, {
        "contrast": {"before": before, "after": contrast()},
        "went_back_to_iteration": None if back is None else back[0] // each,
        "curve": read_log(run.path("metrics.jsonl")),
    }


def _apply(
    settings: Settings,
    opened: Opened,
    rectifier: ConditionRectifier,
    relations: Sequence[tuple[RelationTexts, RelationPrompts]],
    record: dict[str, Any],
    run: Run,
) -> None:
    """Pictures at every weight, side by side, and the numbers."""
    import torch

    from rectiflow.cli.inversion import distances
    from rectiflow.files import write_json
    from rectiflow.interop.diffusers import clip_of
    from rectiflow.training.figures import save_images

    weights = settings.w if 0 in settings.w else (0.0, *settings.w)
    clip, rectifier = clip_of(opened.pipe), rectifier.to(opened.device)
    said: list[dict[str, Any]] = []
    with counting("pictures", len(relations) * len(weights), "columns") as update:
        for number, (texts, prompts) in enumerate(relations):
            with torch.no_grad():
                shifts = rectifier.shifts(prompts)
            columns = {}
            for weight in weights:
                columns[weight] = _pictures(settings, opened, prompts, shifts, weight)
                update(number * len(weights) + len(columns))
            file = run.path(f"heldout-{number}.png" if number else "relations.png")
            rows = torch.stack(list(columns.values()), 1)
            save_images(rows.flatten(0, 1), file, columns=len(weights))
            said.append(
                {
                    "prompts": list(texts.sentences),
                    "tokens": dict(zip("ARB", clip.tokens(texts.words))),
                    "heldout": number > 0,
                    "picture": file.name,
                    **_lengths(prompts, shifts, weights),
                    "change": {f"{w:g}": distances(x, columns[0.0]) for w, x in columns.items()},
                }
            )
    write_json(run.path("relations.json"), {"w": list(weights), "relations": said, **record})
    for one in said:
        first, last = (one["cosine"][f"{w:g}"] for w in (0.0, weights[-1]))
        print(
            f"{one['prompts'][0]!r} and {one['prompts'][1]!r}: shifts up to "
            f"{max(one['delta_norm'].values()):.3g} long, cosine of the ends {first:.4f} -> "
            f"{last:.4f} at weight {weights[-1]:g}"
        )
    print(f"pictures and numbers: {run.folder}")


def _pictures(
    settings: Settings,
    opened: Opened,
    prompts: RelationPrompts,
    shifts: RelationShifts,
    weight: float,
) -> Tensor:
    """Pictures of both sentences at one weight, from the same noises."""
    import torch

    from rectiflow.cli.inversion import finite
    from rectiflow.flows import sample
    from rectiflow.flows.sampling import draw_source
    from rectiflow.guidance import RelationRectifier, parse_guidance

    field: Any = RelationRectifier(opened.model, shifts, weight)
    if settings.guidance is not None:
        field = parse_guidance(settings.guidance).around(field)
    found = []
    for sentence in range(2):
        generator = torch.Generator().manual_seed(settings.seed)
        latents = sample(
            opened.model,
            source=draw_source(opened.model, settings.pictures, generator=generator),
            field=field,
            steps=settings.sampling_steps,
            solver=settings.solver,
            generator=generator,
            **prompts.rows(torch.full((settings.pictures,), sentence, device=opened.device)),
        )
        with torch.no_grad():
            found.append(finite(opened.images(latents), "picture"))
    return torch.cat(found)


def _lengths(
    prompts: RelationPrompts, shifts: RelationShifts, weights: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Lengths of shifts and of what they shift, and the cosine of both sentences' ends."""
    from rectiflow.guidance.relation_prompts import PROMPTS
    from rectiflow.vectors import cosine, norm

    ends, deltas = prompts.end_vectors(), shifts.deltas.cpu()
    moved = {w: ends + w * deltas for w in weights}
    return {
        "delta_norm": dict(zip(PROMPTS, norm(deltas).tolist())),
        "end_norm": dict(zip(PROMPTS, norm(ends).tolist())),
        "cosine": {f"{w:g}": float(cosine(x[:1], x[1:2])) for w, x in moved.items()},
    }
