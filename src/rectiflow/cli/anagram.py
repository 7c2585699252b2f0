"""`rectiflow anagram`: pictures that show something else when they are turned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import check_folder, check_guidance, counting, data_of, guided_by
from rectiflow.cli.settings import parse
from rectiflow.errors import positive

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.cli.models import Opened
    from rectiflow.guidance import Anagram, Balance

SHOWN = 8
"""Most samples in the animation."""


@dataclass(frozen=True)
class Settings:
    """Settings of `rectiflow anagram`."""

    model: tyro.conf.Positional[str]
    """Model folder, diffusers pipeline folder, or owner/name on the Hub."""
    views: tuple[str, ...] = ("identity", "flip")
    """identity, flip, mirror, rotate:90, negate, skew, patch-permute:8:SEED, pixel-permute:SEED,
    jigsaw:SEED, inner-circle, square-hinge, or several joined by +; for --combine sum low:2 and
    high:2, grey and colour, motion:9 and still:9, share:0.3."""
    labels: tuple[str, ...] = ()
    """The class that each view shows, such as 3,8."""
    prompts: tuple[str, ...] = ()
    """The text that each view shows, for a model of a pipeline."""
    style: str = ""
    """Words put before every prompt, such as "an oil painting of"."""
    concepts: tuple[str, ...] = ()
    """The words of each prompt whose attention is compared; its last word by default."""
    combine: Literal["mean", "balanced", "min-norm", "alternate", "sum"] = "mean"
    """How the answers for the views become one."""
    rectify: Literal["none", "official", "matched"] = "none"
    """Give back the variance that averaging takes; for pixel models under ancestral sampling."""
    guidance: float | str = 3.0
    """Guidance of each view: a scale, cfg:4,stop=0.8 or apg:7.5,eta=0,momentum=-0.5,norm=15."""
    antiseg_lr: float = 0.0
    """Step by which concepts are drawn to the same places; the paper's is 5, 0 for none."""
    antiseg_until: float = 0.86
    """Time (1 is data) from which steps are no longer corrected so."""
    clip: str | None = None
    """CLIP model of transformers, folder or Hub name, that scores views of prompts."""
    count: int = 4
    """Pictures."""
    steps: int = 30
    """Solver steps."""
    solver: str | None = None
    """Any solver of rectiflow sample; the model's own by default."""
    reveal: bool = True
    """Also write an animation from view to view."""
    truncate: bool = False
    """Cut prompts that are longer than a tokenizer takes."""
    init: str = "native"
    """How a pipeline's diffusion network is read: native, analytic or reinterpret."""
    pipeline: str | None = None
    """Pipeline with VAE and text encoders of a trained model."""
    seed: int = 0
    """Seed of the noises."""
    batch_size: int = 16
    """Pictures computed together."""
    out: Path = Path("anagram")
    """Folder for views.png, reveal.gif, samples.npy and result.json."""
    overwrite: bool = False
    """Write over the files in --out."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "steps"):
            positive(name, getattr(self, name))
        check_guidance(self.guidance)
        positive("antiseg_lr", self.antiseg_lr, zero=True)
        if math.isinf(self.antiseg_lr):
            raise ValueError("antiseg_lr must be finite, got inf")
        if not 0 <= self.antiseg_until <= 1:
            raise ValueError(f"antiseg_until must be in [0, 1], got {self.antiseg_until}")
        if bool(self.labels) == bool(self.prompts):
            raise ValueError("say what each view shows: --labels 3,8 or --prompts TEXT TEXT")
        if self.concepts and not self.prompts:
            raise ValueError("--concepts are words of prompts: give --prompts")
        if self.clip is not None and not self.prompts:
            raise ValueError("--clip scores prompts, and the views are of --labels: leave it out")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="anagram", summary=COMMANDS["anagram"].summary)
    out = settings.out
    check_folder(out, overwrite=settings.overwrite)
    import torch

    from rectiflow.cli.inversion import finite
    from rectiflow.cli.models import open_model
    from rectiflow.guidance import AntiSegregation, OverlapMeter
    from rectiflow.training.runs import plain

    opened = open_model(
        settings.model, device=settings.device, init=settings.init, pipeline=settings.pipeline
    )
    anagram, wanted, clip = _anagram(settings, opened)
    meter = None
    if settings.antiseg_lr:
        meter = OverlapMeter(AntiSegregation(anagram.spans or ()))
    generator = torch.Generator().manual_seed(settings.seed)
    latents, overlaps = [], []
    starts = range(0, settings.count, settings.batch_size)
    with counting("anagram", settings.steps * len(starts), "steps") as update:
        for number, start in enumerate(starts):
            latents.append(
                anagram(
                    min(settings.batch_size, settings.count - start),
                    correctors=() if meter is None else (meter,),
                    generator=generator,
                    progress=lambda done, number=number: update(number * settings.steps + done),
                )
            )
            if meter is not None and meter.overlap is not None:
                overlaps.append(meter.overlap.mean(0))
    with torch.no_grad():
        images = finite(torch.cat([opened.images(one) for one in latents]), "picture")
    record = {
        "settings": plain(asdict(settings)),
        "wanted": wanted,
        "scores": _scores(settings, opened, anagram, images, clip),
        "overlap": torch.cat(overlaps).tolist() if overlaps else None,
    }
    _write(settings, record, anagram, images)
    print(f"{settings.count} pictures in {len(anagram.views)} views{_summary(record)}: {out}")
    return 0


def _anagram(
    settings: Settings, opened: Opened
) -> tuple[Anagram, list[str], Callable[..., Tensor] | None]:
    """The sampler, what each view shows in words, and what CLIP says of that, if it is asked."""
    from rectiflow.cli.inversion import grid_of
    from rectiflow.cli.pictures import picture_shape
    from rectiflow.cli.view_words import views_of
    from rectiflow.guidance import Anagram

    picture_shape(opened)
    shape: Any = opened.model.shape
    views = views_of(settings.views, shape)
    conditions, wanted, spans = _conditions(settings, opened)
    if len(wanted) != len(views):
        kind = "labels" if settings.labels else "prompts"
        raise ValueError(
            f"there are {len(views)} views and {len(wanted)} {kind}: give one for each view"
        )
    clip: Callable[..., Tensor] | None = None
    if settings.clip is not None:
        from rectiflow.align.rewards import ClipScore, load_clip

        clip = ClipScore(*load_clip(settings.clip), list(opened.prompts))
    anagram = Anagram(
        opened.model,
        list(zip(views, conditions)),
        guide=lambda model: guided_by(model, settings.guidance),
        combine=settings.combine,
        rectify=settings.rectify,
        balance=_balance(settings, opened, clip) if settings.combine == "balanced" else None,
        steps=grid_of(opened, settings.steps),
        solver=settings.solver or opened.model.sampling["solver"],
        spans=spans,
        antiseg=settings.antiseg_lr,
        until=settings.antiseg_until,
    )
    return anagram, wanted, clip


def _conditions(
    settings: Settings, opened: Opened
) -> tuple[list[dict[str, Any]], list[str], list[tuple[int, ...]]]:
    """The condition of every view, it in words, and the tokens of its concept."""
    from rectiflow.cli.models import attach_prompts
    from rectiflow.cli.options import labels_for

    if settings.labels:
        words = [part for word in settings.labels for part in word.split(",")]
        if not all(word.strip().isdigit() for word in words):
            raise ValueError(f"--labels are numbers of classes, got {','.join(words)}")
        labels = [int(word) for word in words]
        for label in labels:
            labels_for(opened.model, 1, label, None)
        # A label is one token, the first.
        spans: list[tuple[int, ...]] = [(0,) for _ in labels]
        return [{"label": label} for label in labels], [str(one) for one in labels], spans
    prompts = [f"{settings.style} {prompt}".strip() for prompt in settings.prompts]
    attach_prompts(opened, prompts, truncate=settings.truncate)
    spans = []
    if settings.antiseg_lr:
        from rectiflow.interop.diffusers import concept_tokens

        concepts = settings.concepts or tuple(prompt.split()[-1] for prompt in prompts)
        if len(concepts) != len(prompts):
            raise ValueError(
                f"there are {len(prompts)} prompts and {len(concepts)} concepts: give one each"
            )
        spans = [concept_tokens(opened.pipe, p, c) for p, c in zip(prompts, concepts)]
    return [{"prompt": number} for number in range(len(prompts))], prompts, spans


def _balance(settings: Settings, opened: Opened, clip: Callable[..., Tensor] | None) -> Balance:
    """What balanced views go by: CLIP, or a classifier of the model's own data."""
    from rectiflow.guidance import Balance, ClassSimilarity

    if clip is not None:
        return Balance(lambda latents, **given: clip(opened.images(latents), **given))
    if settings.prompts:
        raise ValueError("--combine balanced needs scores of prompts: name a CLIP model by --clip")
    from rectiflow.files import cache_folder
    from rectiflow.training.evaluation import load_features

    train, test = (data_of(opened.model, split) for split in ("train", "test"))
    features = load_features(train, test, kind="classifier", cache=cache_folder())
    judge: Any = features.to(opened.device).net
    return Balance(ClassSimilarity(judge.logits))


def _scores(
    settings: Settings,
    opened: Opened,
    anagram: Anagram,
    images: Tensor,
    clip: Callable[..., Tensor] | None,
) -> dict[str, Any] | None:
    """Every view against what every view should show; None where nobody can judge."""
    import torch

    from rectiflow.guidance import alignment, concealment, score_matrix

    count = len(images)
    score: Callable[..., Tensor]
    if clip is not None:
        score, judge, name = clip, settings.clip, "prompt"
    elif settings.labels and "spec" in opened.model.data:
        from rectiflow.align.rewards import fit_linear

        # Not the classifier that balances: nobody should judge his own work.
        linear, name, judge = fit_linear(data_of(opened.model)), "label", "logistic regression"
        rows = torch.arange(count)

        def chance(pictures: Tensor, *, label: Tensor) -> Tensor:
            return linear(pictures).softmax(1)[rows, label]

        score = chance
    else:
        return None
    wanted = [{name: torch.full((count,), given[name])} for _, given in anagram.views]
    matrix = score_matrix(score, anagram.shown(images), wanted).float()
    return {
        "judge": judge,
        "mean": matrix.mean(0).tolist(),
        "alignment": alignment(matrix).tolist(),
        "concealment": concealment(matrix).tolist(),
    }


def _write(settings: Settings, record: dict[str, Any], anagram: Anagram, images: Tensor) -> None:
    """The views side by side, a row a sample; the animation, the array and the numbers."""
    import numpy as np
    import torch

    from rectiflow.cli.reveal import write_reveal
    from rectiflow.files import files_in, write_json
    from rectiflow.training.figures import save_images

    shown, views = anagram.shown(images), [view for view, _ in anagram.views]
    sheet = torch.stack(shown, 1).flatten(0, 1)
    with files_in(settings.out, r"reveal\.gif") as folder:
        save_images(sheet, folder / "views.png", columns=len(views))
        if settings.reveal:
            write_reveal([one[:SHOWN] for one in shown], views, folder / "reveal.gif")
        np.save(folder / "samples.npy", images.clamp(-1, 1).numpy())
        write_json(folder / "result.json", record)


def _summary(record: dict[str, Any]) -> str:
    """The numbers in a few words."""
    said = ""
    if record["scores"] is not None:
        marks = record["scores"]["alignment"]
        said += f", worst view scores {sum(marks) / len(marks):.3g}"
    if record["overlap"] is not None:
        said += f", overlap {sum(record['overlap']) / len(record['overlap']):.3g}"
    return said
