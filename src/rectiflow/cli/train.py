"""`rectiflow train`: train a flow on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import (
    DataOptions,
    DiagnoseOptions,
    OutputOptions,
    plain_warnings,
    watching,
)
from rectiflow.cli.settings import parse
from rectiflow.errors import unknown
from rectiflow.training.trainer import TrainerSettings


@dataclass(frozen=True)
class Settings(OutputOptions, TrainerSettings, DataOptions, DiagnoseOptions):
    """Settings of `rectiflow train`."""

    net: str | None = None
    """Network or size preset (mlp, unet-s, ...); chosen by image size by default."""
    path: str = "rectified"
    """Path from noise to data: rectified, vp, sub-vp, cosine, edm, ve, ..."""
    prediction: str = "velocity"
    """What the network predicts: velocity, noise, data or score."""
    coupling: str = "independent"
    """independent, or ot for minibatch optimal transport."""
    conditional: bool = False
    """Train on the class labels of the data."""
    condition_dropout: float = 0.1
    """Share of samples trained without their label (conditional models only)."""

    def __post_init__(self) -> None:
        TrainerSettings.__post_init__(self)
        self.check_output()
        self.check_diagnoses()
        if self.coupling not in ("independent", "ot"):
            raise unknown("coupling", self.coupling, ("independent", "ot"))


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="train", summary=COMMANDS["train"].summary)
    with plain_warnings():
        run(settings)
    return 0


def run(settings: Settings) -> None:
    """Train and say where the model is."""
    import torch

    from rectiflow.flows import FlowModel, Independent, MinibatchOT, path_registry
    from rectiflow.nets import build, preset_for
    from rectiflow.training import FlowMatching
    from rectiflow.training.sessions import train_model

    path = path_registry.build(settings.path)
    data = settings.load()
    if settings.conditional and data.labels is None:
        raise ValueError(f"--conditional needs labels, and {settings.data} has none")
    if not settings.conditional:
        data = replace(data, labels=None, classes=())
    name = settings.net or preset_for(data.shape)
    torch.manual_seed(settings.seed)
    net = build(name, shape=data.shape, classes=len(data.classes))
    facts = {
        "name": data.name,
        "spec": settings.data,
        "size": settings.size,
        "channels": settings.channels,
        "classes": list(data.classes),
    }
    model = FlowModel(net, path, settings.prediction, shape=data.shape, data=facts)
    independent = Independent(data)
    coupling = MinibatchOT(independent) if settings.coupling == "ot" else independent
    dropout = settings.condition_dropout if settings.conditional else 0.0
    method = FlowMatching(model, coupling, condition_dropout=dropout)
    diagnoses = settings.diagnoses(method, settings)
    with settings.open("train", data.slug) as folder:
        folder.used("rectified-flow", *settings.systems)
        train_model(
            method,
            settings,
            folder.folder,
            entry={
                "method": "flow",
                "data": data.name,
                "samples": len(data),
                "net": name,
                "coupling": settings.coupling,
                "systems": ["rectified-flow"],
            },
            resume=settings.resume,
            callbacks=watching(diagnoses, folder),
        )
        if folder.main:
            print(f"model: {folder.path('model')}")
