"""What alignment gains and what it loses: measures on fixed noises, a curve, a stop in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.align.method import RewardMethod
from rectiflow.align.rewards.checked import Checked
from rectiflow.errors import positive
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.sampling import sample
from rectiflow.training.records import MetricsLog
from rectiflow.training.trainer import Trainer

if TYPE_CHECKING:
    from jaxtyping import Float


def diversity(images: Float[Tensor, "b *dims"]) -> float:
    """Mean distance between two images; alignment that collapses drives it to zero.

    Raises:
        ValueError: fewer than two images.

    Example:
        >>> diversity(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        5.0
    """
    if len(images) < 2:
        raise ValueError("diversity needs two or more images")
    return float(torch.pdist(images.detach().flatten(1).double()).mean())


@torch.no_grad()
def measure(
    model: FlowModel,
    rewards: Mapping[str, Any],
    source: Float[Tensor, "b *dims"],
    *,
    steps: int | Sequence[float] | None = None,
    solver: Any = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    **condition: Any,
) -> dict[str, float]:
    """Mean rewards and diversity of what a model makes of given noises.

    Put the reward it was aligned with beside one that it was not: where only the first rises, it
    was deceived.

    Args:
        model: the model.
        rewards: name to reward.
        source: the noises, the same for every model compared.
        steps: number of steps or grid of times; the model's own by default.
        solver: the solver; the model's own by default.
        decode: from samples to images.
        batch_size: samples computed together.
        generator: randomness of stochastic solvers.
        **condition: what the images are made for, one row a sample.

    Returns:
        the mean of each reward by name, and `diversity`.

    Example:
        >>> flow = FlowModel(lambda x, t: torch.zeros_like(x), shape=(2,))
        >>> found = measure(flow, {"top": lambda x: x.amax(1)}, torch.tensor([[0.0, 1], [0, 3]]))
        >>> found["top"], found["diversity"]
        (2.0, 2.0)
    """
    x = sample(
        model,
        source=source,
        steps=steps,
        solver=solver,
        batch_size=batch_size,
        generator=generator,
        **condition,
    )
    images = x if decode is None else torch.cat([decode(part) for part in x.split(batch_size)])
    found = {
        name: float(Checked(reward, differentiable=False)(images, **condition).mean())
        for name, reward in rewards.items()
    }
    return {**found, "diversity": diversity(images)}


class RewardCurve:
    """A callback that writes the mean reward of training samples to a file, step by step.

    Args:
        method: the method that is trained.
        file: JSON lines; cut back when training resumes from an earlier step.
        every: steps between lines.
    """

    def __init__(self, method: RewardMethod, file: Path | None, *, every: int = 1) -> None:
        positive("every", every)
        self.method, self.file, self.every = method, file, every
        self.rows: list[dict[str, float]] = []
        self._log: MetricsLog | None = None

    def __call__(self, trainer: Trainer, step: int) -> None:
        if self._log is None:
            main = trainer.accelerator.is_main_process
            self._log = MetricsLog(self.file if main else None, step - 1)
        if step % self.every == 0 or trainer.ends:
            numbers = self.method.take()
            self.rows.append({"step": step, **numbers})
            self._log.write(step, numbers)


class EarlyStop:
    """A callback that ends training when a held-out measure falls, and goes back to the best.

    A model that is pushed toward one reward comes to deceive it: the reward rises on while a
    second one, which it was not trained on, falls. A resumed training watches anew from there.

    Args:
        held_out: from the model to a number, the more the better, on fixed noises; see `measure`.
        every: steps between looks.
        patience: looks below the best, since that best, before it ends.
        tolerance: a fall below the best by less than this is noise.

    Raises:
        ValueError: numbers that are not positive.
    """

    def __init__(
        self,
        held_out: Callable[[FlowModel], float],
        *,
        every: int = 10,
        patience: int = 3,
        tolerance: float = 0.0,
    ) -> None:
        positive("every", every)
        positive("patience", patience)
        positive("tolerance", tolerance, zero=True)
        self.held_out, self.every, self.patience = held_out, every, patience
        self.tolerance = tolerance
        self.values: list[tuple[int, float]] = []
        self.best: tuple[int, float] | None = None
        self.stopped = False
        self._worse = 0
        self._kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def __call__(self, trainer: Trainer, step: int) -> None:
        if step % self.every and not trainer.ends:
            return
        model = trainer.method.model
        value = self.held_out(model)
        self.values.append((step, value))
        if self.best is None or value > self.best[1]:
            self.best, self._worse = (step, value), 0
            self._kept = (_weights(model), _copied(trainer.ema.state_dict()))
        elif not value >= self.best[1] - self.tolerance:
            self._worse += 1
        if self._worse >= self.patience and self._kept is not None:
            weights, average = self._kept
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, weight in weights.items():
                    own[name].copy_(weight)
            trainer.ema.load_state_dict(average)
            self.stopped = True
            trainer.finish_early()


def _weights(model: FlowModel) -> dict[str, Tensor]:
    """Copies of the weights that are trained."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in state.items()}
