"""Features for the Fréchet distance: a small classifier of the data, a random net, or Inception."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from rectiflow import errors, files
from rectiflow.training.evaluation.feature_net import FeatureNet, fit, standardise
from rectiflow.training.evaluation.inception import Inception
from rectiflow.training.evaluation.labelled_images import LabelledImages

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

VERSION = 1  # of the training settings: a change here retrains every cached net
KINDS = ("auto", "classifier", "random", "inception:PATH")
Progress = Callable[[int, int], None]


class Features:
    """A fixed map from images to feature vectors, and the name its Fréchet distance goes by.

    Args:
        name: `fd_<data>`, `fd_random_<data>` or `fid`.
        net: module from images (b, c, h, w) in [-1, 1] to vectors (b, d).
        dimension: d.
        shape: the (c, h, w) it accepts; None for any.
        accuracy: test accuracy of the classifier it comes from, None for other nets.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        dimension: int,
        *,
        shape: tuple[int, ...] | None = None,
        accuracy: float | None = None,
    ) -> None:
        self.name = name
        self.net = net.eval().requires_grad_(False)
        self.dimension = dimension
        self.shape = shape
        self.accuracy = accuracy

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"], *, chunk: int = 512) -> Tensor:
        """Feature vectors of images.

        Args:
            images: floats in [-1, 1] on the net's device.
            chunk: images per forward pass.

        Returns:
            float32 features of shape (b, d).

        Raises:
            ValueError: images of another shape than the net was made for.
        """
        if images.ndim != 4 or (self.shape and tuple(images.shape[1:]) != self.shape):
            wanted = ("b", *self.shape) if self.shape else ("b", "c", "h", "w")
            raise ValueError(
                f"{self.name} takes images of shape ({', '.join(map(str, wanted))}), "
                f"got {tuple(images.shape)}"
            )
        parts = [self.net(part.float()) for part in images.split(chunk)]
        return torch.cat(parts) if parts else images.new_zeros(0, self.dimension).float()

    def to(self, device: torch.device | str) -> Features:
        """Move the net to a device."""
        self.net.to(device)
        return self


def load_features(
    train: LabelledImages,
    test: LabelledImages,
    *,
    kind: str = "auto",
    cache: Path | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Features:
    """Features to judge samples of a data set by.

    `classifier` trains a small net on the data's own labels once and takes its penultimate layer,
    centred and scaled to average variance one on the training images; distances are comparable
    within one data set only. `random` is the same net untrained, for data without labels: it
    notices colour, contrast and local texture, not meaning. `auto` chooses between the two by
    whether there are labels. `inception:PATH` gives the features of FID from a local weight file.

    Args:
        train: images, and labels if any.
        test: images to report the classifier's accuracy on.
        kind: one of the four above.
        cache: folder to keep trained nets in; None trains anew. A damaged entry is replaced.
        seed: of initial weights and batch order; the global generator is left alone.
        progress: called with (step, steps) while training.

    Returns:
        the features, on the CPU.

    Raises:
        ValueError: an unknown kind, `classifier` without labels, or images of two shapes.
        FileNotFoundError: no Inception weights at the path.
        MissingExtraError: Inception without torch-fidelity.

    Example:
        >>> from rectiflow.training.data import load
        >>> train, test = load("digits"), load("digits", split="test")
        >>> load_features(train, test, kind="random").name
        'fd_random_digits'
    """
    if kind.startswith("inception:"):
        return Features("fid", Inception(Path(kind.removeprefix("inception:"))), 2048)
    if kind not in KINDS[:3]:
        raise errors.unknown("features", kind, KINDS)
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = f"{train.images.shape[1:]} and {test.images.shape[1:]}"
        raise ValueError(f"train and test images must have one shape, got {shapes}")
    if kind == "auto":
        kind = "random" if train.labels is None else "classifier"
    if kind == "classifier" and (train.labels is None or test.labels is None):
        raise ValueError(f"{train.name} has no labels to train a classifier on; use kind='random'")
    folder = None
    if cache is not None:
        key = f"{train.slug}-{kind}-v{VERSION}-seed{seed}-{_fingerprint(train, test)[:16]}"
        folder = Path(cache) / key
    features = _read(folder) if folder else None
    if features is None:
        features = _make(train, test, kind, seed, progress)
        if folder:
            _write(folder, features)
    return features


def _make(
    train: LabelledImages, test: LabelledImages, kind: str, seed: int, progress: Progress | None
) -> Features:
    shape = tuple(int(n) for n in train.images.shape[1:])
    classes = 0 if train.labels is None else int(np.max(train.labels)) + 1
    net = FeatureNet(shape, max(classes, len(train.classes), 1), seed=seed)
    accuracy, name = None, "fd_random_"
    if kind == "classifier":
        accuracy, name = fit(net, train, test, seed=seed, progress=progress), "fd_"
    standardise(net, train)
    slug = train.slug.replace("-", "_")
    return Features(name + slug, net, net.dimension, shape=shape, accuracy=accuracy)


def _fingerprint(*data: LabelledImages) -> str:
    """The SHA-256 of all images and labels."""
    total = hashlib.sha256()
    for part in data:
        for array in (part.images, part.labels):
            if array is not None:
                total.update(f"{array.dtype}{array.shape}".encode())
                for start in range(0, len(array), 4096):
                    total.update(np.ascontiguousarray(array[start : start + 4096]).data)
    return total.hexdigest()


def _write(folder: Path, features: Features) -> None:
    from safetensors.torch import save_file

    net = features.net
    assert isinstance(net, FeatureNet)
    with files.atomic_folder(folder) as temporary:
        save_file(
            {k: v.contiguous() for k, v in net.state_dict().items()}, temporary / "net.safetensors"
        )
        record = {
            "name": features.name,
            "accuracy": features.accuracy,
            "config": net.config,
            "sha256": files.digest(temporary / "net.safetensors"),
        }
        (temporary / "features.json").write_text(json.dumps(record, indent=2) + "\n")


def _read(folder: Path) -> Features | None:
    """The cached features, or None if they are absent or damaged."""
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        if files.digest(folder / "net.safetensors") != record["sha256"]:
            return None
        net = FeatureNet(**record["config"])
        net.load_state_dict(load_file(folder / "net.safetensors"))
        accuracy = None if record["accuracy"] is None else float(record["accuracy"])
        return Features(record["name"], net, net.dimension, shape=net.shape, accuracy=accuracy)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
