"""Folders of a relation: `index.json` with its words, and pictures for each of its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.cli.models import Opened
    from rectiflow.guidance import RelationTexts

INDEX = "index.json"


def read_texts(folder: Path, *, alone: str) -> RelationTexts:
    """The words and sentences that a relation's `index.json` names.

    Args:
        folder: the folder.
        alone: the sentence about one object, with `{}` in its place.

    Raises:
        FileNotFoundError: no folder, or no index in it.
        ValueError: an index that is damaged or incomplete, or a word that is not in its prompt.
    """
    from rectiflow.files import read_json
    from rectiflow.guidance import RelationTexts

    file = folder / INDEX
    if not file.is_file():
        what = f"{folder} has no {INDEX}" if folder.is_dir() else f"there is no folder {folder}"
        raise FileNotFoundError(
            f"{what}: --relation-dir needs {INDEX} with A, R, B, ARB and BRA, and pictures in "
            "folders ARB, BRA, A and B"
        )
    return RelationTexts.from_index(read_json(file), alone=alone, where=str(file))


def read_pictures(folder: Path, opened: Opened, *, fit: bool) -> dict[str, Tensor]:
    """The pictures of each prompt as samples of a model.

    Args:
        folder: holds the folders ARB, BRA, A and B.
        opened: the model.
        fit: crop, scale and convert pictures of another size or mode.

    Raises:
        FileNotFoundError: a prompt without pictures.
        ValueError: a picture that is damaged or of another size or mode.
    """
    import torch

    from rectiflow.cli.pictures import picture_shape, read_images
    from rectiflow.guidance.relation_prompts import PROMPTS
    from rectiflow.training.data.pictures import EXTENSIONS

    found = {}
    for name in PROMPTS:
        inside = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        files = [f for f in inside if f.suffix.lower() in EXTENSIONS and f.name[0] != "."]
        if not files:
            raise FileNotFoundError(
                f"no images in {folder / name}/ (looked for {', '.join(EXTENSIONS)}): each of "
                f"{', '.join(PROMPTS)} needs some"
            )
        images = read_images(files, picture_shape(opened), fit=fit)
        with torch.no_grad():
            parts = [opened.latents(part.to(opened.device)) for part in images.split(4)]
        found[name] = torch.cat(parts)
    return found
