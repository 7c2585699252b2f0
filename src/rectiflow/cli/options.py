"""Options that several commands share."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.errors import positive
from rectiflow.files import cache_folder
from rectiflow.training.progress import bar
from rectiflow.training.runs import Run, new_folder

if TYPE_CHECKING:
    from rectiflow.flows.fields import FlowModel
    from rectiflow.training.data import ImageData
    from rectiflow.training.trainer import TrainerSettings


@dataclass(frozen=True)
class OutputOptions:
    """Where results go and what happens if something is there."""

    out: Path | None = None
    """Run folder; runs/COMMAND-NAME-TIME by default."""
    resume: bool = False
    """Go on with the run in --out."""
    overwrite: bool = False
    """Start anew in an --out that holds a run."""

    def check_output(self) -> None:
        """Refuse flags that contradict each other."""
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out: the run folder to go on with")

    def open(self, command: str, name: str = "") -> Run:
        """The run of a command, with these settings; says on stderr where it is."""
        self.check_output()
        folder = self.out if self.out is not None else new_folder(command, name)
        run = Run(folder, command, self, resume=self.resume, overwrite=self.overwrite)
        if run.main:
            print(f"run folder: {run.folder}", file=sys.stderr)
        return run


@dataclass(frozen=True)
class DataOptions:
    """Which images."""

    data: str = "digits"
    """digits, fashion-mnist, photos, folder:PATH, hub:NAME, parquet:PATH or npy:PATH."""
    size: int | None = None
    """Side to which images are cut and scaled; needed where sizes differ."""
    channels: int | None = None
    """1 (grey) or 3 (colour); as the files are by default."""

    def load(self, split: str = "train") -> ImageData:
        """The images of a split."""
        return load_data(self.data, split=split, size=self.size, channels=self.channels)


@dataclass(frozen=True)
class DiagnoseOptions:
    """What looks on while a model trains, and changes nothing."""

    diagnose: str = ""
    """Reports on the training itself, drawn in the run's report.html: sharpness, opposing-signals,
    scale-invariance, win-rate; several with commas between."""
    diagnose_every: int | None = None
    """Steps between their looks; a twentieth of the training by default."""

    def check_diagnoses(self) -> None:
        """Refuse names that are unknown."""
        from rectiflow.diagnose import parse_diagnoses

        parse_diagnoses(self.diagnose)
        if self.diagnose_every is not None:
            positive("diagnose_every", self.diagnose_every)

    def diagnoses(self, method: Any, settings: TrainerSettings) -> list[Any]:
        """The diagnoses of a training, on no more samples at once than a step takes."""
        from rectiflow.diagnose import diagnoses

        every = self.diagnose_every or max(1, settings.steps // 20)
        return diagnoses(self.diagnose, method, every=every, batch_size=settings.micro)


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder to write into that is a file, or that is there unless told so."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another --out")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another --out or pass --overwrite")


def watching(found: Sequence[Any], run: Run) -> list[Any]:
    """The callbacks by which diagnoses look on in a run, which notes what it used."""
    from rectiflow.diagnose import DIAGNOSES, Watch

    run.used(*(DIAGNOSES[diagnosis.name].system for diagnosis in found))
    return [Watch(found, run.folder)] if found else []


def load_data(
    spec: str, *, split: str = "train", size: int | None = None, channels: int | None = None
) -> ImageData:
    """Images by spec string, decoded once into the cache."""
    from rectiflow.training import data

    return data.load(spec, split=split, size=size, channels=channels, cache=cache_folder())


def data_of(model: FlowModel, split: str = "train") -> ImageData:
    """The images that a model was trained on, as its folder records them."""
    known = model.data
    if "spec" not in known:
        raise ValueError("the model does not say what it was trained on: name the data by --data")
    return load_data(
        known["spec"], split=split, size=known.get("size"), channels=known.get("channels")
    )


def labels_for(model: FlowModel, count: int, label: int | None, generator: Any) -> dict[str, Any]:
    """The condition for samples of one class, or of random classes for a conditional model."""
    import torch

    classes = model.classes
    if not classes:
        if label is not None:
            raise ValueError("--label was given but the model takes no labels")
        return {}
    if label is None:
        return {"label": torch.randint(classes, (count,), generator=generator)}
    if not 0 <= label < classes:
        raise ValueError(f"--label must be in 0 to {classes - 1}, got {label}")
    return {"label": torch.full((count,), label)}


def check_guidance(guidance: float | str | None, *, negative: str | None = None) -> None:
    """Refuse words that say nothing about guidance, and a negative prompt without any."""
    if negative is not None and guidance is None:
        raise ValueError("--negative says what to guide away from: give --guidance too")
    if guidance is not None:
        from rectiflow.guidance.specs import parse_guidance

        parse_guidance(guidance)


def guided_by(
    model: FlowModel, guidance: float | str, *, negative: dict[str, Any] | None = None
) -> Any:
    """The model under the guidance of a scale or of words such as `apg:7.5,eta=0`.

    Args:
        model: a model that takes a condition.
        guidance: the scale or the words.
        negative: what to guide away from, where it is no label.

    Raises:
        ValueError: the model takes no condition, or a setting is out of its range.
    """
    if not model.conditional:
        raise ValueError(
            "--guidance needs a model that takes labels or prompts, and this one does not: train "
            "it with --conditional"
        )
    from rectiflow.guidance.specs import parse_guidance

    spec = parse_guidance(guidance)
    unwanted, classes = spec.settings.get("negative", {}), model.classes
    if unwanted and not 0 <= unwanted["label"] < classes:
        raise ValueError(
            f"negative in --guidance must be a label from 0 to {classes - 1}, got "
            f"{unwanted['label']}"
            if classes
            else "negative in --guidance is a label, and the model takes none: use --negative"
        )
    if negative is not None:
        spec.settings["negative"] = negative
    return spec.around(model)


def choose_device(name: str) -> Any:
    """A torch device: auto takes a GPU when there is one.

    Of several processes on one machine each takes a GPU of its own.

    Raises:
        ValueError: the device is not available.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not available ({reason}): use auto or cpu") from None
    return device


@contextmanager
def plain_warnings(*expected: type[Warning]) -> Iterator[None]:
    """Show warnings as one line, without the source line they came from, but the expected ones."""

    def show(message: Any, *rest: Any, **more: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        for kind in expected:
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = show
        yield


@contextmanager
def counting(title: str, total: int, unit: str) -> Iterator[Any]:
    """A progress bar's `update`."""
    with bar(title, total, unit=unit) as progress:
        yield progress.update
