"""Model folders: `model.safetensors`, `config.json` and a card, checked when they are read."""

from __future__ import annotations

import hashlib
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import nn

from rectiflow import __version__, nets
from rectiflow.errors import ModelFolderError, require
from rectiflow.files import atomic_folder, digest, read_json, write_json, write_text
from rectiflow.flows import path_registry
from rectiflow.flows.fields import FlowModel

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def save(model: FlowModel, folder: str | FilePath, *, overwrite: bool = False) -> FilePath:
    """Write a model folder as a whole: weights, configuration, card."""
    folder = FilePath(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another folder or pass overwrite=True")
    net = model.net
    if not isinstance(net, nn.Module):
        raise ValueError(f"only networks that are torch modules can be saved, got {type(net)}")
    with atomic_folder(folder) as temporary:
        save_file(_state(net), temporary / WEIGHTS)
        config = _config(model, digest(temporary / WEIGHTS))
        write_json(temporary / CONFIG, config)
        write_text(temporary / CARD, _card(config))
    return folder


def load(
    source: str | FilePath, *, net: nn.Module | None = None, revision: str | None = None
) -> FlowModel:
    """Read a model folder or Hub model; see `FlowModel.from_pretrained`."""
    folder = _locate(source, revision)
    config = _read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ModelFolderError(
                f"{folder} holds pickled weights ({', '.join(pickles)}), which can run code when "
                f"read and are refused: save the model as {WEIGHTS}"
            )
        raise ModelFolderError(f"{folder} has no {WEIGHTS}: the folder is incomplete, copy it anew")
    if digest(weights) != config["sha256"]:
        raise ModelFolderError(
            f"{weights} is not the file that {CONFIG} describes (SHA-256 differs): it is truncated "
            "or was changed, copy the folder anew"
        )
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{weights} cannot be read ({error}): copy it anew") from None
    net = net if net is not None else _build(folder, config["net"])
    _fill(folder, net, state)
    try:
        return FlowModel(
            net,
            path_registry.build(**config["path"]),
            config["prediction"],
            shape=config["shape"],
            sampling=config["sampling"],
            data=config["data"],
            lineage=config["lineage"],
        ).eval()
    except (ValueError, TypeError) as error:
        raise ModelFolderError(f"{folder / CONFIG} describes no model: {error}") from None


def identity(model: FlowModel) -> str | None:
    """The SHA-256 that the saved `config.json` would state; None for a net without weights."""
    if not isinstance(model.net, nn.Module):
        return None
    return hashlib.sha256(to_bytes(_state(model.net))).hexdigest()


def _state(net: nn.Module) -> dict[str, torch.Tensor]:
    # Tied tensors share storage, which safetensors refuses; each gets its own copy.
    return {name: t.detach().cpu().clone() for name, t in net.state_dict().items()}


def push(model: FlowModel, name: str, *, private: bool = False) -> str:
    """Upload a model to the Hub."""
    require("app", "huggingface_hub")
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as parent:
        folder = save(model, FilePath(parent) / "model")
        return str(api.upload_folder(repo_id=name, folder_path=folder))


def _config(model: FlowModel, sha256: str) -> dict[str, Any]:
    config = getattr(model.net, "config", None)
    name = getattr(model.net, "name", None)
    known = isinstance(config, dict) and name in nets.names()
    return {
        "format": FORMAT,
        "rectiflow": __version__,
        "path": model.path.config(),
        "prediction": model.prediction,
        "shape": list(model.shape) if model.shape is not None else None,
        "net": {"name": name, "config": config}
        if known
        else {"name": None, "class": type(model.net).__qualname__},
        "sampling": model.sampling,
        "data": model.data,
        "lineage": model.lineage,
        "sha256": sha256,
    }


def _locate(source: str | FilePath, revision: str | None) -> FilePath:
    folder = FilePath(source)
    if folder.is_dir():
        return folder
    text = str(source)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no model folder at {text} (a folder with {CONFIG} and {WEIGHTS}, or owner/name on "
            "the Hub)"
        )
    require("app", "huggingface_hub")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(text, revision=revision, allow_patterns=[WEIGHTS, CONFIG, CARD])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"no model folder at {text}, and no such model could be read from the Hub ({reason})"
        ) from None
    return FilePath(found)


def _read_config(folder: FilePath) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
        advice = f"; name one inside: {', '.join(inside)}" if inside else ""
        raise ModelFolderError(
            f"{folder} has no {CONFIG}: it is not a rectiflow model folder{advice}"
        )
    try:
        config = read_json(file)
    except ValueError as error:
        raise ModelFolderError(str(error)) from None
    expected = {
        "format": int,
        "path": dict,
        "prediction": str,
        "shape": (list, type(None)),
        "net": dict,
        "sampling": dict,
        "data": dict,
        "lineage": list,
        "sha256": str,
    }
    if not isinstance(config, dict):
        raise ModelFolderError(f"{file} must hold a table, got {type(config).__name__}")
    for key, kind in expected.items():
        if not isinstance(config.get(key, KeyError), kind):  # type: ignore[arg-type]
            raise ModelFolderError(f"{file} lacks a valid {key!r}: restore the file")
    if config["format"] > FORMAT:
        raise ModelFolderError(
            f"{file} has format {config['format']}, this version reads up to {FORMAT}: "
            "update rectiflow"
        )
    if "name" not in config["path"]:
        raise ModelFolderError(f"{file} lacks the name of its path: restore the file")
    return config


def _build(folder: FilePath, net: dict[str, Any]) -> nn.Module:
    if net.get("name") is None:
        raise ModelFolderError(
            f"{folder} was saved from a network of your own ({net.get('class')}): pass it as "
            "from_pretrained(..., net=...)"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            return nets.build(net["name"], **net.get("config", {}))
    except (ValueError, TypeError) as error:
        raise ModelFolderError(f"{folder / CONFIG} describes no network: {error}") from None


def _fill(folder: FilePath, net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = net.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        name = (shapes or missing or extra)[0]
        detail = (
            f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the "
            "network"
            if shapes
            else f"{len(missing)} tensors are missing and {len(extra)} are unknown, such as {name}"
        )
        raise ModelFolderError(f"{folder / WEIGHTS} does not fit its network: {detail}")
    net.load_state_dict(state)


def _card(config: dict[str, Any]) -> str:
    """A model card: what it is, how to use it, how it was made."""
    net, data = config["net"], config["data"]
    lines = [
        "---",
        "library_name: rectiflow",
        "tags: [rectified-flow, flow-matching]",
        "---",
        "",
        f"# A flow on {data.get('name', 'custom data')}",
        "",
        f"- network: `{net.get('name') or net.get('class')}`",
        f"- path: `{config['path']['name']}`, prediction: `{config['prediction']}`",
        f"- sample shape: `{config['shape']}`",
        f"- sampling: {config['sampling'].get('solver')}, {config['sampling'].get('steps')} steps",
        f"- weights: SHA-256 `{config['sha256']}`",
        "",
        "```python",
        "from rectiflow.flows import FlowModel, sample",
        "",
        'model = FlowModel.from_pretrained("path/to/this/folder")',
        "images = sample(model, 16)",
        "```",
        "",
        "## Lineage",
        "",
    ]
    for number, entry in enumerate(config["lineage"], 1):
        facts = ", ".join(f"{k}: {v}" for k, v in entry.items() if k != "method")
        lines.append(f"{number}. **{entry.get('method', 'step')}** ({facts})")
    return "\n".join(lines) + "\n"
