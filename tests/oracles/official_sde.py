"""The drift of rectified flow's official stochastic sampler, which does not keep the marginals."""

import math

import torch


def official_drift(v, x, t, scale, std=1.0):
    """`v + scale² / (2 std²) (t (1 - t) v / 2 - (2 - t) x / 2)`, as the official code has it."""
    return v + scale**2 / (2 * std**2) * (0.5 * t * (1 - t) * v - 0.5 * (2 - t) * x)


def official_sampler(velocity, x, steps, scale, generator):
    """Euler-Maruyama with that drift and noise of size `scale (1 - t)`."""
    for i in range(steps):
        t = i / steps
        v = velocity(x, torch.full((len(x),), t, dtype=x.dtype))
        fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = x + official_drift(v, x, t, scale) / steps + scale * (1 - t) * fresh / math.sqrt(steps)
    return x
