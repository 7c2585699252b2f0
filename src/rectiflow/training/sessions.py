"""Train a method in a folder and leave a model with its lineage there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rectiflow.flows.artifact import identity
from rectiflow.flows.fields import FlowModel
from rectiflow.training import checkpoints
from rectiflow.training.method import Method
from rectiflow.training.runs import MODEL, plain
from rectiflow.training.trainer import CHECKPOINTS, Trainer, TrainerSettings


def train_model(
    method: Method,
    settings: TrainerSettings,
    folder: Path | str,
    *,
    entry: Mapping[str, Any],
    parent: FlowModel | None = None,
    title: str = "train",
    resume: bool = False,
    callbacks: Sequence[Callable[[Trainer, int], None]] = (),
    finish: Callable[[FlowModel], FlowModel] | None = None,
) -> FlowModel:
    """Train, record the lineage, write `folder/model` and return the averaged model.

    Args:
        method: what to train.
        settings: how.
        folder: holds checkpoints, the loss log and, at the end, the model folder.
        entry: what the lineage says of this training; `method` names it.
        parent: the model it started from or learned from.
        title: shown beside the progress bar.
        resume: go on from the newest checkpoint; a finished model is returned as it is. Without it
            model and checkpoints of an earlier training are removed.
        callbacks: see `Trainer`.
        finish: makes of the trained model the one that is kept, such as by merging adapters.
    """
    folder = Path(folder)
    target = folder / MODEL
    if resume and target.is_dir():
        return FlowModel.from_pretrained(target)
    trainer = Trainer(method, settings, folder=folder, title=title, callbacks=callbacks)
    if not resume and trainer.accelerator.is_main_process:
        forget(folder)
    model = trainer.fit(resume=resume)
    if finish is not None:
        model = finish(model)
    made: dict[str, Any] = {
        **plain(entry),
        "steps": trainer.step,
        "batch_size": trainer.batches.plan.size,
        "seed": settings.seed,
    }
    if settings.tract is not None:
        made["tract"] = settings.tract
    if settings.systems:
        made["systems"] = [*made.get("systems", ()), *settings.systems]
    if parent is not None:
        made["parent"] = (identity(parent) or "")[:12]
    model.lineage = [*(parent.lineage if parent is not None else []), made]
    if trainer.accelerator.is_main_process:
        model.save_pretrained(target, overwrite=True)
    trainer.accelerator.wait_for_everyone()
    return model


def forget(folder: Path | str) -> None:
    """Remove the model and the checkpoints of a training from its folder."""
    folder = Path(folder)
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    checkpoints.clear(folder / CHECKPOINTS)
