"""Several text encoders, each left out of some training samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rectiflow.flows.couplings import Coupling, Draw, Pairs

Span = tuple[int, int | None]
NOTHING: Span = (0, 0)
EVERYTHING: Span = (0, None)


@dataclass(frozen=True)
class EncoderPart:
    """Where one encoder's output lies in the conditions.

    Attributes:
        tokens: first token of `context` and the one after the last (None: to the end).
        channels: the same of its channels.
        pooled: the same of the vector `pooled`.
    """

    tokens: Span = EVERYTHING
    channels: Span = EVERYTHING
    pooled: Span = NOTHING


# CLIP-L and OpenCLIP-G side by side in the first 77 tokens, T5 in the others.
SD3_ENCODERS = (
    EncoderPart(tokens=(0, 77), channels=(0, 768), pooled=(0, 768)),
    EncoderPart(tokens=(0, 77), channels=(768, 2048), pooled=(768, None)),
    EncoderPart(tokens=(77, None)),
)


@dataclass(frozen=True)
class EncoderDropout:
    """The pairs of a coupling, with each text encoder's output zeroed now and then.

    Encoders are dropped independently, so that the model can later do without one of them (T5 is
    large) and, when all vanish, learns the null condition that guidance needs: with three
    encoders and the default, that is one sample in ten. Use it in place of the method's
    `condition_dropout`.

    Args:
        coupling: whose pairs have the conditions `context` and `pooled`.
        parts: where each encoder's output lies.
        probability: of dropping one encoder.

    Raises:
        ValueError: a probability outside [0, 1].

    Example:
        >>> import torch
        >>> from rectiflow.flows import Independent
        >>> from rectiflow.flows.couplings import Draw, TensorData
        >>> data = TensorData(torch.zeros(4, 2), {"context": torch.ones(4, 154, 4096)})
        >>> pairs = EncoderDropout(Independent(data), probability=1.0).draw(Draw.of(2))
        >>> bool(pairs.condition["context"][:, :77, 2048:].all())  # padding belongs to nobody
        True

    Source: arXiv 2403.03206, section 5 (46.4% an encoder).
    """

    coupling: Coupling
    parts: Sequence[EncoderPart] = SD3_ENCODERS
    probability: float = 0.464

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")

    def draw(self, draw: Draw) -> Pairs:
        pairs = self.coupling.draw(draw)
        condition: dict[str, Any] = dict(pairs.condition)
        for key in ("context", "pooled"):
            if key in condition:
                condition[key] = condition[key].clone()
        for part in self.parts:
            dropped = draw.uniform() < self.probability
            if "context" in condition:
                view = condition["context"][:, slice(*part.tokens), slice(*part.channels)]
                view.masked_fill_(dropped[:, None, None], 0)
            if "pooled" in condition:
                view = condition["pooled"][:, slice(*part.pooled)]
                view.masked_fill_(dropped[:, None], 0)
        return replace(pairs, condition=condition)
