"""Folders of condition rectifiers: safetensors and JSON, checked when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rectiflow.errors import ModelFolderError, unknown
from rectiflow.files import atomic_folder, digest, read_json, write_json
from rectiflow.guidance.condition_rectifier import ConditionRectifier
from rectiflow.guidance.graph_attention import RelationalGraphAttention
from rectiflow.guidance.relation_graph import GRAPHS

FORMAT = 1
WEIGHTS, CONFIG = "rectifier.safetensors", "config.json"


def save(rectifier: ConditionRectifier, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a folder as a whole; see `ConditionRectifier.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another folder or pass overwrite=True")
    graph = next((name for name, build in GRAPHS.items() if build is rectifier.graph), None)
    if graph is None:
        raise ValueError(
            f"a graph of your own cannot be saved: use one of {', '.join(GRAPHS)} and keep the "
            "weights by state_dict()"
        )
    state = {name: v.detach().cpu().clone() for name, v in rectifier.state_dict().items()}
    with atomic_folder(folder) as temporary:
        save_file(state, temporary / WEIGHTS)
        write_json(
            temporary / CONFIG,
            {
                "format": FORMAT,
                "kind": "condition-rectifier",
                "net": rectifier.net.config,
                "graph": graph,
                "cap": rectifier.cap,
                "about": rectifier.about,
                "sha256": digest(temporary / WEIGHTS),
            },
        )
    return folder


def load(folder: str | Path) -> ConditionRectifier:
    """Read a folder; see `ConditionRectifier.from_pretrained`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of a rectifier at {folder} ({CONFIG} and {WEIGHTS})")
    config = _config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ModelFolderError(f"{folder} has no {WEIGHTS}: the folder is incomplete, copy it anew")
    if digest(weights) != config.get("sha256"):
        raise ModelFolderError(
            f"{weights} is not the file that {CONFIG} describes (SHA-256 differs): copy it anew"
        )
    try:
        if config["graph"] not in GRAPHS:
            raise unknown("graph", config["graph"], GRAPHS)
        with torch.random.fork_rng(devices=[]):
            net = RelationalGraphAttention(**config["net"])
        graph = GRAPHS[config["graph"]]
        made = ConditionRectifier(net, graph, cap=config["cap"], about=config["about"])
        made.load_state_dict(load_file(weights))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelFolderError(
            f"{folder} describes no rectifier ({str(error).splitlines()[0]}): copy it anew"
        ) from None
    return made.eval()


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise ModelFolderError(f"{folder} has no {CONFIG}: it is no folder of a rectifier")
    try:
        config = read_json(file)
    except ValueError as error:
        raise ModelFolderError(str(error)) from None
    if not isinstance(config, dict) or config.get("kind") != "condition-rectifier":
        raise ModelFolderError(f"{file} describes no rectifier: give one that `relations` wrote")
    version = config.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise ModelFolderError(
            f"{file} has format {version!r}, this version reads up to {FORMAT}: update rectiflow"
        )
    return config
