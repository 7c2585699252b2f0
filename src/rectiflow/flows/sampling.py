"""Samples from a model: noises drawn, batches cut, the model's own settings by default."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import BeyondDistilledStepsWarning
from rectiflow.flows.fields import FlowModel, device_of, evaluating
from rectiflow.flows.integration import Corrector, integrate

if TYPE_CHECKING:
    from jaxtyping import Float


def draw_source(
    model: FlowModel,
    count: int,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "count *dims"]:
    """Standard normal sources for a model, drawn on the generator's device, moved to the model's.

    Raises:
        ValueError: the model does not know the shape of its samples, or `count` is not positive.
    """
    if model.shape is None:
        raise ValueError("the model does not know its sample shape: set shape= or give noises")
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    device = generator.device if generator is not None else torch.device("cpu")
    noise = torch.randn(count, *model.shape, generator=generator, device=device)
    return noise.to(device_of(model))


@torch.no_grad()
def sample(
    model: FlowModel,
    count: int | None = None,
    *,
    source: Float[Tensor, "b *dims"] | None = None,
    steps: int | Sequence[float] | None = None,
    solver: Any = None,
    field: Any = None,
    correctors: Sequence[Corrector] = (),
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """Generate samples with the solver and number of steps that the model was made for.

    Args:
        model: the model.
        count: how many samples; taken from `source` when that is given.
        source: the noises to start from; drawn from `generator` otherwise.
        steps: number of steps or grid of times; the model's own by default.
        solver: solver name or object; the model's own by default.
        field: a guided field around the model, to be followed in its place.
        correctors: see `integrate`.
        batch_size: samples computed together.
        generator: the source of randomness.
        progress: called with the number of samples done after each batch.
        **condition: one row a sample for tensors.

    Returns:
        the samples, on the model's device.

    Raises:
        ValueError: neither `count` nor `source` given, or shapes that do not match.

    Example:
        >>> model = FlowModel(lambda x, t: torch.zeros_like(x), shape=(2,))
        >>> sample(model, 3, steps=1, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if source is None:
        if count is None:
            raise ValueError("give count or source")
        source = draw_source(model, count, generator=generator)
    elif count is not None and count != source.shape[0]:
        raise ValueError(f"count is {count} but source holds {source.shape[0]} noises")
    times = steps if steps is not None else model.sampling["steps"]
    method = solver if solver is not None else model.sampling["solver"]
    _warn_beyond(model, times)
    parts = []
    with evaluating(model):
        for begin in range(0, source.shape[0], batch_size):
            part = slice(begin, begin + batch_size)
            start = model.path.start(source[part])
            parts.append(
                integrate(
                    model if field is None else field,
                    start,
                    times,
                    method,
                    correctors=correctors,
                    generator=generator,
                    **condition_rows(condition, part, source.shape[0]),
                )
            )
            if progress is not None:
                progress(begin + start.shape[0])
    return torch.cat(parts)


def _warn_beyond(model: FlowModel, times: int | Sequence[float]) -> None:
    """Warn when a distilled model takes more steps than it was made for.

    Its field is trained at the start of those steps alone: InstaFlow's FID of 23 in one step
    becomes 73 in two and 103 in four.
    """
    most = model.sampling.get("made_for")
    steps = times if isinstance(times, int) else len(times) - 1
    if most is not None and steps > most:
        warnings.warn(
            f"this model was distilled to {most} step{'s' if most > 1 else ''} and is sampled with "
            f"{steps}: its field was never trained at the times between, expect worse samples",
            BeyondDistilledStepsWarning,
            # Past this function, the sampler and its gradient switch.
            stacklevel=4,
        )


def condition_rows(condition: dict[str, Any], part: slice, count: int) -> dict[str, Any]:
    """The rows of the condition that belong to a part of the batch."""
    rows = {}
    for name, value in condition.items():
        if isinstance(value, Tensor) and value.ndim:
            if value.shape[0] != count:
                raise ValueError(
                    f"condition {name!r} must have one row for each of the {count} samples, "
                    f"got shape {tuple(value.shape)}"
                )
            value = value[part]
        rows[name] = value
    return rows
