"""The times of FLUX: moved toward noise by the number of image tokens."""

from __future__ import annotations

import math

from rectiflow.errors import positive
from rectiflow.flows.time_shift import shifted_times

# Tokens at which the exponent is known, and the exponents there.
FEW, MANY = 256, 4096
LEAST, MOST = 0.5, 1.15


def flux_shift(tokens: int) -> float:
    """The shift of FLUX.1 dev for a number of image tokens: `exp(mu)`, mu linear in the tokens.

    mu is 0.5 for 256 tokens (256x256 pixels) and 1.15 for 4096 (1024x1024), extrapolated outside.

    Args:
        tokens: 2x2 patches of the latent: a sixteenth of the height times that of the width.

    Raises:
        ValueError: no tokens.

    Example:
        >>> round(flux_shift(4096), 4) == round(math.exp(1.15), 4)
        True

    Source: the released sampling code of FLUX.1, as used by arXiv 2411.04746.
    """
    positive("tokens", tokens)
    return math.exp(LEAST + (MOST - LEAST) * (tokens - FEW) / (MANY - FEW))


def flux_times(steps: int, tokens: int | None = None) -> list[float]:
    """The grid of FLUX: equal steps, shifted by `flux_shift`.

    The noise level s of an equal grid becomes `e^mu / (e^mu + 1/s - 1)`.

    Args:
        steps: number of steps.
        tokens: image tokens; None leaves the grid equal, as FLUX.1 schnell takes it.

    Returns:
        steps + 1 times from 0 (noise) to 1.

    Raises:
        ValueError: no steps or no tokens.

    Example:
        >>> [round(1 - t, 3) for t in flux_times(4, 1024)]
        [1.0, 0.849, 0.652, 0.385, 0.0]

    Source: the released sampling code of FLUX.1, as used by arXiv 2411.04746.
    """
    return shifted_times(steps, 1.0 if tokens is None else flux_shift(tokens))
