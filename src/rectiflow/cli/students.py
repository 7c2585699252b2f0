"""What `rectiflow reflow` and `rectiflow distill` share: their flags and the training.

Each method of the command adds the settings it has for itself, as flags `--METHOD.NAME`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.models import Opened, condition_data, is_latent, open_model, reinterpreted
from rectiflow.cli.options import (
    DiagnoseOptions,
    OutputOptions,
    check_guidance,
    data_of,
    guided_by,
    plain_warnings,
    watching,
)
from rectiflow.cli.settings import parse
from rectiflow.distill.few_step_method import Choices, FewStepMethod, Options
from rectiflow.distill.methods import find_method, methods_of
from rectiflow.errors import PairStoreError, positive
from rectiflow.files import atomic_folder
from rectiflow.training.trainer import TrainerSettings


@dataclass(frozen=True)
class StudentOptions(OutputOptions, TrainerSettings, DiagnoseOptions):
    """Settings of every method."""

    command: ClassVar[str] = ""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """The teacher: model folder, diffusers pipeline folder, or owner/name on the Hub."""
    method: str = ""
    """What to do."""
    student: str | None = None
    """Train this instead of a copy of the teacher: a size (unet-7m), a network with arguments
    (mlp:width=48,depth=2), stacked (two copies in series), or the folder of a model to start
    from."""
    prompts: Path | None = None
    """File of prompts, one a line, for teachers that are pipelines or models of them."""
    truncate: bool = False
    """Cut prompts that are longer than a tokenizer takes."""
    init: str = "native"
    """How training starts from a pipeline's diffusion network: native, analytic or reinterpret
    (the teacher is then read as analytic)."""
    pipeline: str | None = None
    """Pipeline with the text encoders of a trained model; the one it was made from by default."""
    export_pipeline: Path | None = None
    """Write the result into this new folder as a stock diffusers pipeline too."""
    lora: int | None = None
    """Train low-rank adapters of this rank instead of all weights; the model has them merged."""
    pairs: Path | None = None
    """Pairs made by the teacher (`rectiflow pairs`); made while training by default."""
    teacher_steps: int = 20
    """Solver steps of the teacher when pairs are made while training."""
    teacher_solver: str = "euler"
    """Its solver."""
    guidance: float | str | None = None
    """Guidance of the teacher (conditional teachers only): the scale of classifier-free guidance,
    cfg:4,stop=0.8 or apg:7.5,eta=0,momentum=-0.5,norm=15."""
    hflip: bool = False
    """Mirror half of the pairs left to right (teachers trained with flips only)."""
    premetric: str | None = None
    """Loss of a sample: l2, pseudo-huber, pseudo-huber:C, noise-l2, data-pseudo-huber:C; the
    method's own by default (l2 for most)."""
    times: str | None = None
    """Which times are looked at: uniform, uniform:LOW:HIGH, u-shaped:A, logit-normal:MEAN:STD, ...;
    the method's own by default."""
    loss_weight: str | None = None
    """Weight of the loss over time: snr, inverse-snr, snr+1, karras, truncated, clipped or
    squared-noise; uniform by default."""
    condition_dropout: float | None = None
    """Share of samples trained without their label or prompt (conditional teachers only); the
    method's own by default: 0.1 for text-reflow, 0 for the others."""

    def __post_init__(self) -> None:
        TrainerSettings.__post_init__(self)
        self.check_output()
        self.check_diagnoses()
        positive("teacher_steps", self.teacher_steps)
        check_guidance(self.guidance)
        if self.lora is not None:
            self._check_lora()
        report = getattr(self, "report", 0)
        if report < 0 or report == 1:
            raise ValueError(f"--report needs two pairs or more, or 0 for none, got {report}")
        if self.export_pipeline is not None and self.export_pipeline.exists() and not self.resume:
            raise ValueError(f"{self.export_pipeline} exists: choose another --export-pipeline")
        chosen = self.chosen
        for name, other in methods_of(self.command).items():
            own = getattr(self, other.key, None)
            if own is not None and name != chosen.name and own != other.options():
                raise ValueError(
                    f"settings of {name} were given but the method is {chosen.name}: add "
                    f"--method {name} or leave out --{name}.*"
                )
        if self.loss_weight is not None and not chosen.times:
            raise ValueError(
                f"{chosen.name} looks only at times of its own, so --loss-weight has no meaning: "
                "leave it out"
            )
        if not chosen.pairs and (self.pairs is not None or self.hflip):
            raise ValueError(
                f"{chosen.name} trains on data, not on pairs: leave out --pairs/--hflip"
            )
        self.loss()
        self.sampler()

    def _check_lora(self) -> None:
        """Refuse adapters where no trained weights stay."""
        assert self.lora is not None
        positive("lora", self.lora)
        if self.chosen.student == "impossible":
            raise ValueError(f"{self.chosen.name} trains all of its weights: leave out --lora")
        fresh = self.student is not None and not self.student.startswith("stacked")
        if fresh and not Path(str(self.student)).is_dir():
            raise ValueError(
                f"--lora adapts trained weights and {self.student} has random ones: leave out "
                "--student, or name the folder of a model"
            )

    @property
    def chosen(self) -> FewStepMethod:
        """The method of the table."""
        return find_method(self.method, self.command)

    @property
    def own(self) -> Options:
        """The settings that the method has for itself."""
        return getattr(self, self.chosen.key, Options())

    def conditions(self, opened: Opened) -> Any:
        """Prompts or labels of the pairs; labels only where the pairs are not stored already."""
        latent = is_latent(opened.model)
        if latent and not self.chosen.pairs:
            others = ", ".join(n for n, e in methods_of(self.command).items() if e.pairs)
            raise ValueError(
                f"{self.chosen.name} trains on data, and a pipeline brings none: take a method "
                f"that trains on pairs ({others})"
            )
        if self.export_pipeline is not None and not latent:
            raise ValueError(
                f"--export-pipeline is for models of pipelines, and {self.model} makes images"
            )
        stored = self.pairs is not None or not self.chosen.pairs
        if stored and not latent and self.prompts is None:
            return None
        return condition_data(opened, self.prompts, truncate=self.truncate)

    def coupling(self, teacher: Any, guided: Any, conditions: Any) -> Any:
        """Stored pairs of this teacher, live ones, or its data."""
        from rectiflow.flows import Independent, LivePairs, PairSymmetry, StoredPairs
        from rectiflow.flows.artifact import identity

        if not self.chosen.pairs:
            data = data_of(teacher)
            plain = data if teacher.conditional else replace(data, labels=None, classes=())
            return Independent(plain)
        found: Any
        if self.pairs is not None:
            found = StoredPairs(self.pairs, expects=identity(teacher))
            _check_guidance(found.store, guided)
            _check_prompts(found.store, conditions if self.prompts is not None else None)
        else:
            found = LivePairs(teacher, self.teacher_steps, self.teacher_solver, conditions, guided)
        return PairSymmetry(found) if self.hflip else found

    def loss(self) -> Any:
        """The premetric, or None for the method's own."""
        from rectiflow.flows.specs import parse_premetric
        from rectiflow.flows.weights import Weighted

        if self.loss_weight is not None:
            return Weighted(parse_premetric(self.premetric or "l2"), self.loss_weight)
        return None if self.premetric is None else parse_premetric(self.premetric)

    def sampler(self) -> Any:
        """The time sampler, or None for the method's own."""
        from rectiflow.flows.specs import parse_times

        return None if self.times is None else parse_times(self.times)

    def starting(self, opened: Opened, conditions: Any) -> Any:
        """The model that training starts from, or None for a copy of the teacher."""
        from rectiflow.distill.lora import with_lora
        from rectiflow.distill.students import new_student

        start = None
        if self.init == "reinterpret":
            start = reinterpreted(opened, conditions)
        base = start if start is not None else opened.model
        if self.student is not None:
            start = new_student(
                base, self.student, keep_path=self.chosen.keeps_path, seed=self.seed
            )
            if is_latent(base):
                start = _with_table(start, conditions)
        if self.lora is None or (start is None and self.chosen.student == "needed"):
            return start
        return with_lora(start if start is not None else base, self.lora, seed=self.seed)

    def choices(self, student: Any, guided: Any) -> Choices:
        """What was chosen, for the method."""
        return Choices(
            steps=self.steps,
            student=student,
            times=self.sampler(),
            premetric=self.loss(),
            guided=guided,
            condition_dropout=self.condition_dropout,
            options=self.own,
        )


def _check_guidance(store: Any, guided: Any) -> None:
    """Refuse pairs that another guidance made."""
    from rectiflow.distill.generation import describe_field

    made = store.settings.guidance
    if guided is not None and made != describe_field(guided):
        raise PairStoreError(
            f"{store.folder} was made with {made or 'no guidance'}, not {describe_field(guided)}: "
            "generate pairs with this --guidance or leave it out here"
        )


def _check_prompts(store: Any, table: Any) -> None:
    """Refuse pairs that belong to other prompts."""
    lineage = store.settings.teacher.get("lineage") or []
    made = [entry.get("sha256") for entry in lineage if entry.get("method") == "prompts"]
    if table is not None and made != [table.digest[:12]]:
        raise PairStoreError(
            f"{store.folder} was made with other prompts: give the --prompts file that its pairs "
            "were made with"
        )


def settings_for(command: str) -> Any:
    """The settings class of a command: what all methods share, and the own ones of each."""
    methods = methods_of(command)
    listed = "; ".join(f"{name}: {entry.summary}" for name, entry in methods.items())
    own: list[Any] = [("method", Annotated[str, tyro.conf.arg(help=listed)], next(iter(methods)))]
    if command == "reflow":
        text = (
            "Pairs in the report of what the round straightened and whether another would help "
            "(for methods on pairs); 0 leaves it out"
        )
        own.append(("report", Annotated[int, tyro.conf.arg(help=text)], 256))
    own += [
        (entry.key, entry.options, field(default_factory=entry.options))
        for entry in methods.values()
        if entry.options is not Options
    ]
    return make_dataclass(
        "Settings",
        own,
        bases=(StudentOptions,),
        frozen=True,
        namespace={"command": command, "__doc__": f"Settings of `rectiflow {command}`."},
    )


def run(kind: Any, words: Sequence[str]) -> int:
    """Train a student of a teacher in a run folder and say where it is."""
    command = kind.command
    settings = parse(kind, words, command=command, summary=COMMANDS[command].summary)
    from rectiflow.distill.lora import save_lora
    from rectiflow.distill.reflow import reflow_rounds
    from rectiflow.training.sessions import train_model

    chosen = settings.chosen
    # A reinterpreted network is no teacher before it is trained.
    init = "analytic" if settings.init == "reinterpret" else settings.init
    opened = open_model(settings.model, init=init, pipeline=settings.pipeline)
    conditions = settings.conditions(opened)
    teacher = opened.model
    if command == "distill" and chosen.pairs and not reflow_rounds(teacher):
        print(
            "note: the teacher was not reflowed; a straightened teacher distils better as a rule",
            file=sys.stderr,
        )
    guided = None if settings.guidance is None else guided_by(teacher, settings.guidance)
    with plain_warnings():
        coupling = settings.coupling(teacher, guided, conditions)
        student = settings.starting(opened, conditions)
        method = chosen.make(teacher, coupling, settings.choices(student, guided))
        check = getattr(method, "check_training", None)
        if check is not None:
            check(settings)
        diagnoses = settings.diagnoses(method, settings)
        if settings.export_pipeline is not None:
            # Now, not after hours of training.
            _as_pipeline(_merged(method.model), opened)
    named = ("premetric", "times", "loss_weight", "student", "guidance", "lora")
    asked = {name: getattr(settings, name) for name in named}
    entry = {
        **chosen.entry(settings.own),
        **{name: value for name, value in asked.items() if value is not None},
        **({"hflip": True} if settings.hflip else {}),
        **({"init": settings.init} if settings.init != "native" else {}),
    }
    with settings.open(command, str(teacher.data.get("name", ""))) as folder:
        folder.used(*chosen.systems, *settings.systems)

        def finish(model: Any) -> Any:
            if settings.lora is not None and folder.main:
                save_lora(model, folder.path("adapters.safetensors"))
            return _merged(model)

        model = train_model(
            method,
            settings,
            folder.folder,
            entry=entry,
            parent=teacher,
            title=chosen.name,
            resume=settings.resume,
            callbacks=watching(diagnoses, folder),
            finish=finish,
        )
        if folder.main:
            print(f"model: {folder.path('model')}")
            _export(model, opened, settings.export_pipeline)
            if chosen.pairs and getattr(settings, "report", 0):
                if settings.prompts is not None:
                    model = _with_table(model, conditions)
                _report(settings, teacher, model, coupling, folder.folder)
    return 0


def _report(settings: Any, teacher: Any, model: Any, coupling: Any, folder: Path) -> None:
    """Say what the round straightened, and whether another would help."""
    import torch

    from rectiflow.distill.straightening import straightened
    from rectiflow.flows.couplings import Draw
    from rectiflow.flows.fields import device_of

    device = device_of(teacher)
    # The step after the last: live pairs that the training did not see.
    draw = Draw.of(
        settings.report,
        step=settings.steps,
        seed=settings.seed,
        generator=torch.Generator(device),
    )
    with plain_warnings():
        pairs, size = coupling.draw(draw), settings.micro
        found = straightened(teacher, model.to(device), pairs, folder, batch_size=size)
    print(f"straightening: {found.sentence}")


def _with_table(model: Any, table: Any) -> Any:
    """The model with a table of prompts, which folders do not keep."""
    from rectiflow.interop.diffusers import with_prompts

    return with_prompts(model, table)


def _merged(model: Any) -> Any:
    """A model with its adapters, if it has some, in its weights."""
    from rectiflow.distill.lora import AdaptedNet, merge_lora

    return merge_lora(model) if isinstance(model.net, AdaptedNet) else model


def _as_pipeline(model: Any, opened: Opened) -> Any:
    from rectiflow.interop.diffusers import to_pipeline

    return to_pipeline(model, opened.pipe)


def _export(model: Any, opened: Opened, folder: Path | None) -> None:
    """Write a stock pipeline as a whole, unless a run that went on had done so."""
    if folder is None or folder.exists():
        return
    with atomic_folder(folder) as temporary:
        _as_pipeline(model, opened).save_pretrained(temporary)
    print(f"pipeline: {folder}")
