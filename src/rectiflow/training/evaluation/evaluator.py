"""One evaluator for a data set: the same noises, features and floor for every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.sampling import draw_source, sample
from rectiflow.training.evaluation.features import load_features
from rectiflow.training.evaluation.frechet import MomentAccumulator, Moments, frechet_distance
from rectiflow.training.evaluation.manifold import precision_recall

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.training.data import ImageData

MOST_PIXELS = 1024
"""Largest number of pixel values for which the pixel-space distance is computed: its covariance
has that many rows, and beyond it neither the estimate nor its root is worth the time."""

DECODED = 16
"""Latents decoded together: a decoder's activations are hundreds of times as large."""


@dataclass(frozen=True)
class Scores:
    """How close samples are to data.

    Attributes:
        fd: Fréchet distance of features to the training set.
        fd_pixels: the same of raw pixels in [-1, 1]; None for large images.
        precision: share of samples that lie within the data's manifold.
        recall: share of data that lie within the samples' manifold.
        count: number of samples.
    """

    fd: float
    fd_pixels: float | None
    precision: float
    recall: float
    count: int


class Evaluator:
    """Scores models against a data set.

    Distances are to the training set, as is usual for FID; the distance between training and test
    set is their floor: a generator as good as fresh data scores about that. All models get the
    same noises and labels, drawn from `seed`.

    Args:
        train: the training set.
        test: the held-out set, for the floor.
        count: samples drawn for a score.
        features: "auto", or "inception:PATH" for FID with local Inception weights.
        neighbours: k of precision and recall.
        manifold: data and samples compared for precision and recall (their cost is quadratic).
        seed: seed of noises and labels.
        cache: folder for trained features.
        decode: from samples to images in [-1, 1], for models of latents.
        condition: from row numbers of the training set to what samples are conditioned on; the
            labels of those rows by default.
    """

    def __init__(
        self,
        train: ImageData,
        test: ImageData,
        *,
        count: int = 5000,
        features: str = "auto",
        neighbours: int = 3,
        manifold: int = 2000,
        seed: int = 1234,
        cache: Path | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        condition: Callable[[Tensor], dict[str, Tensor]] | None = None,
    ) -> None:
        for name, value in (("count", count), ("neighbours", neighbours), ("manifold", manifold)):
            positive(name, value)
        self._decode, self._condition = decode, condition or train.condition
        self.train, self.test, self.count, self.seed = train, test, count, seed
        self.neighbours, self.manifold = neighbours, manifold
        self.features = load_features(train, test, kind=features, cache=cache)
        self.pixels = train.batch(torch.arange(1)).numel() <= MOST_PIXELS
        self._real, self._real_pixels = self._moments(train)
        self._sample = self.features(self._some(train, manifold))

    @property
    def name(self) -> str:
        """What the feature distance is called: `fid`, or `fd_<data>` for other features."""
        return self.features.name

    def floor(self) -> Scores:
        """The scores of the test set."""
        return self._scores(self.test)

    def noises(self, model: FlowModel) -> tuple[Float[Tensor, "b *dims"], dict[str, Tensor]]:
        """The sources and conditions that every model is scored on."""
        generator = torch.Generator().manual_seed(self.seed)
        source = draw_source(model, self.count, generator=generator)
        rows = torch.randint(len(self.train), (self.count,), generator=generator)
        condition = self._condition(rows) if model.conditional else {}
        return source, {k: v.to(source.device) for k, v in condition.items()}

    def randomness(self) -> torch.Generator:
        """What stochastic solvers draw from: the same for every model, apart from its noises."""
        return torch.Generator().manual_seed(self.seed + 1)

    def score(
        self,
        model: FlowModel,
        *,
        steps: int | Sequence[float] | None = None,
        solver: Any = None,
        field: Any = None,
        batch_size: int = 1024,
        progress: Callable[[int], None] | None = None,
    ) -> Scores:
        """The scores of a model's samples; `field` is followed in place of the model's own."""
        source, condition = self.noises(model)
        samples = sample(
            model,
            source=source,
            steps=steps,
            solver=solver,
            field=field,
            batch_size=batch_size,
            progress=progress,
            generator=self.randomness(),
            **condition,
        )
        return self.compare(self.images(samples))

    def images(self, samples: Float[Tensor, "b *dims"]) -> Float[Tensor, "b c h w"]:
        """Samples as images: decoded a few at a time, or as they are."""
        if self._decode is None:
            return samples
        with torch.no_grad():
            return torch.cat([self._decode(part) for part in samples.split(DECODED)])

    def compare(self, images: Float[Tensor, "b c h w"]) -> Scores:
        """The scores of given images in [-1, 1]."""
        from rectiflow.flows.couplings import TensorData

        return self._scores(TensorData(images.cpu()))

    def _scores(self, data: Any) -> Scores:
        moments, pixels = self._moments(data)
        found = self.features(self._some(data, self.manifold))
        manifold = precision_recall(self._sample, found, neighbours=self.neighbours)
        return Scores(
            fd=frechet_distance(moments, self._real),
            fd_pixels=frechet_distance(pixels, self._real_pixels)
            if pixels is not None and self._real_pixels is not None
            else None,
            precision=manifold.precision,
            recall=manifold.recall,
            count=len(data),
        )

    def _moments(self, data: Any) -> tuple[Moments, Moments | None]:
        features, pixels = MomentAccumulator(), MomentAccumulator()
        for rows in torch.arange(len(data)).split(1024):
            images = data.batch(rows)
            features.update(self.features(images))
            if self.pixels:
                pixels.update(images.flatten(1))
        return features.moments(), pixels.moments() if self.pixels else None

    def _some(self, data: Any, count: int) -> Tensor:
        """A fixed random subset."""
        generator = torch.Generator().manual_seed(self.seed)
        return data.batch(torch.randperm(len(data), generator=generator)[:count])
