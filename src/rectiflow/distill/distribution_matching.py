"""Distribution matching: a generator of few steps whose samples are distributed as the teacher's.

No pairs: the generator is moved along the difference of two scores, the teacher's and that of a
second flow trained on its own samples, weighted by a divergence's function of the density ratio.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rectiflow.distill.conditions import repeated
from rectiflow.distill.density_ratio import (
    Discriminator,
    Judge,
    LogRatio,
    RatioClip,
    discriminator_loss,
)
from rectiflow.distill.divergences import Divergence, resolve
from rectiflow.distill.few_steps import FewSteps, start_times
from rectiflow.distill.ratio_weights import TINY, RatioWeights
from rectiflow.distill.rectified_diffusion import check_start
from rectiflow.distill.reflow import student_of
from rectiflow.distill.teachers import model_inside
from rectiflow.errors import positive
from rectiflow.flows.couplings import Coupling, Data, Draw, Independent
from rectiflow.flows.fields import Field, FlowModel, device_of, evaluating
from rectiflow.flows.guided import refuse_memory
from rectiflow.flows.paths import expand
from rectiflow.flows.premetrics import L2, Premetric
from rectiflow.flows.times import TimeSampler, Uniform
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.method import Phase
from rectiflow.training.optimizers import OptimizerSettings

if TYPE_CHECKING:
    from jaxtyping import Float

R1_NOISE = 0.1
"""Standard deviation of the noise by which the approximate R1 penalty disturbs real data."""


class DistributionMatching:
    """Distil a teacher into a one-step or few-step generator by matching distributions.

    Use it when pairs are too costly, or when the generator should be free of the teacher's
    coupling. Three parts are trained: the generator G, a fake flow that learns G's samples, and a
    discriminator on the teacher's features that tells the density ratio r. With
    `x = G(z)`, `x_t = alpha x + sigma noise` and the estimates D of the data at `x_t`, the
    generator follows `w (D_fake - D_teacher)`, `w = h(r) / mean|x - D_teacher|`, where
    `h(r) = f''(r) r²` has mean one. `rkl` (h = 1) seeks modes and is the plain method of DMD;
    `kl` and `jf` cover them; `js` stands between. One generator update goes with `student_every`
    updates of the other two. Score the averaged generator, which the trainer returns.

    Args:
        teacher: any `Field`: a `FlowModel` on any path with any prediction, a guided field around
            one, or a field in closed form (which needs `student`). It is moved to the device of
            the training and otherwise left alone.
        data: real data for the discriminator and the conditions: data, a tensor, or a coupling
            whose targets count as real (`LivePairs` makes them with the teacher). Not needed by
            an unconditional `rkl` without `gan_weight`.
        student: the model to start from, such as a reflowed one; a copy of the teacher's by
            default. It may have another network, prediction and path.
        fake: the flow of the generator's samples at the start; a copy of the teacher's model, or
            of the student, by default. It must have the teacher's path.
        divergence: rkl, sf, js, sh, kl, jf, neyman, pearson, or a convex f(r) of your own.
        steps: number of the generator's steps (equally spaced), or the times at which they start.
        simulate: feed later steps with the generator's own earlier ones (backward simulation)
            instead of with noised real data.
        times: times at which distributions are compared.
        ratio: a known log-ratio `(x, t, **condition) -> (b,)` such as `constant_ratio`; learned by
            the discriminator by default.
        discriminator: a module of your own from a list of features to `(b,)` logits.
        features: what the discriminator sees: names of modules of the teacher's net or a function
            of `(x, t, **condition)`; the middle of the net by default.
        weights: the normalised weights; ten time bins with decay 0.9 by default.
        clip: bounds of logits and ratios.
        gan_weight: weight of the generator's adversarial loss; the ratio is used without it too.
        r1: weight of an approximate gradient penalty of the discriminator, 100 to 1000 if at all.
        same_noise: show the discriminator real data at the fakes' times with the fakes' noise.
        premetric: the fake flow's loss, in its own prediction.
        student_every: steps of fake flow and discriminator for one of the generator.
        warmup: steps before the generator's first.
        student_optimizer: the generator's; the trainer's by default, as for the next two.
        fake_optimizer: the fake flow's.
        discriminator_optimizer: the discriminator's.

    Raises:
        ValueError: models whose shapes or paths do not fit, a student that predicts noise or the
            score from pure noise, guidance with momentum, missing data, times that do not start at
            0 and rise below 1, or an unknown or non-convex divergence.

    Example:
        >>> from rectiflow.nets import MLP
        >>> teacher = FlowModel(MLP(shape=(2,), width=8, depth=1), shape=(2,))
        >>> method = DistributionMatching(teacher, torch.randn(64, 2), divergence="kl")
        >>> [phase.name for phase in method.phases()]
        ['student', 'fake', 'discriminator']

    Source: arXiv 2502.15681, algorithm 1; the losses and two time scales of arXiv 2405.14867.
        Fake flow and discriminator are trained in every step, as there.
    """

    def __init__(
        self,
        teacher: Field,
        data: Coupling | Data | Tensor | None = None,
        *,
        student: FlowModel | None = None,
        fake: FlowModel | None = None,
        divergence: str | Divergence | Callable[..., Tensor] = "js",
        steps: int | Sequence[float] = 1,
        simulate: bool = False,
        times: TimeSampler | None = None,
        ratio: LogRatio | None = None,
        discriminator: nn.Module | None = None,
        features: str | Sequence[str] | Callable[..., Any] | None = None,
        weights: RatioWeights | None = None,
        clip: RatioClip | None = None,
        gan_weight: float = 1e-3,
        r1: float = 0.0,
        same_noise: bool = False,
        premetric: Premetric | None = None,
        student_every: int = 5,
        warmup: int = 0,
        student_optimizer: OptimizerSettings | None = None,
        fake_optimizer: OptimizerSettings | None = None,
        discriminator_optimizer: OptimizerSettings | None = None,
    ) -> None:
        positive("student_every", student_every)
        for name, value in (("gan_weight", gan_weight), ("r1", r1), ("warmup", warmup)):
            positive(name, value, zero=True)
        self.clip = clip if clip is not None else RatioClip()
        low, high = self.clip.reach
        self.divergence = resolve(divergence, low=low, high=high)
        self.teacher, self.ratio = teacher, ratio
        self.gan_weight, self.r1, self.same_noise = gan_weight, r1, same_noise
        self.model, self.fake = _start(teacher, student, fake)
        self.data = _coupling(data)
        self.generator = FewSteps(self.model, start_times(steps), simulate, self.data)
        self.model.sampling = self.generator.sampling
        self.times = times if times is not None else Uniform(0.02, 0.98)
        span = (getattr(self.times, "low", 0.0), getattr(self.times, "high", 1.0))
        self.weights = weights or RatioWeights(low=span[0], high=span[1])
        self.fitting = FlowMatching(
            self.fake, self.generator, self.times, premetric or L2(), name="fake"
        )
        self.student_every, self.warmup = student_every, warmup
        self.optimizers = (student_optimizer, fake_optimizer, discriminator_optimizer)
        judged = gan_weight > 0 or not (self.divergence.constant or ratio is not None)
        self.judge = self._judge(judged, features, discriminator)

    def phases(self) -> list[Phase]:
        """The generator, the fake flow and, if it is needed, the discriminator."""
        student, fake, judge = self.optimizers
        # The weights' running means belong to the checkpoints.
        trained = nn.ModuleDict({"student": self.model, "weights": self.weights})
        every, first = self.student_every, self.warmup
        found = [
            Phase("student", trained, self.student_loss, every, student, first=first),
            Phase("fake", self.fake, self.fake_loss, optimizer=fake),
        ]
        if self.judge is not None:
            module = self.judge.discriminator
            found.append(Phase("discriminator", module, self.discriminator_loss, optimizer=judge))
        return found

    def student_loss(self, draw: Draw) -> Tensor:
        """The matching loss of the generator's samples, and its adversarial loss."""
        self._place(draw.device)
        given = self.generator.given(draw)
        t, condition = self._times(draw, given.noise), given.condition
        x = self.generator.generate(given)
        shown = x if self.gan_weight else x.detach()
        x_t = self.teacher.path.interpolate(given.noise, shown, t)
        teacher, logits = self._teach(x_t, t, condition)
        with torch.no_grad(), evaluating(self.fake):
            fake = self.fake.denoise(x_t, t, **condition)
        weights = self._weigh(x_t, t, condition, logits)
        loss = matching_loss(x, matching_gradient(x, fake, teacher, weights))
        if self.gan_weight:
            assert logits is not None
            loss = loss + self.gan_weight * nn.functional.softplus(-logits).mean()
        return loss

    def fake_loss(self, draw: Draw) -> Tensor:
        """The flow-matching loss of the fake flow on the generator's samples."""
        self._place(draw.device)
        return self.fitting.loss(draw)

    def discriminator_loss(self, draw: Draw) -> Tensor:
        """How badly the discriminator tells noised fakes from noised reals."""
        assert self.judge is not None
        self._place(draw.device)
        given, path = self.generator.given(draw), self.teacher.path
        assert given.real is not None
        t, noise, real = self._times(draw, given.noise), given.noise, given.real.target
        states, times = [path.interpolate(noise, self.generator.samples(draw, given), t)], [t]
        if not self.same_noise:
            t, noise = self._times(draw, noise), draw.normal(noise.shape[1:]).to(noise)
        shown = [real]
        if self.r1:
            shown.append(real + R1_NOISE * draw.normal(noise.shape[1:]).to(noise))
        states += [path.interpolate(noise, target, t) for target in shown]
        times += [t] * len(shown)
        condition = repeated(given.condition, len(states))
        logits = self.judge.logits(torch.cat(states), torch.cat(times), condition)
        fake, real_logits, *disturbed = logits.chunk(len(states))
        loss = discriminator_loss(fake, real_logits)
        if self.r1:
            loss = loss + self.r1 * (real_logits - disturbed[0]).square().mean()
        return loss

    def _times(self, draw: Draw, like: Tensor) -> Tensor:
        return self.times.sample(draw.size, generator=draw.generator)[draw.part].to(like)

    def _teach(
        self, x: Tensor, t: Tensor, condition: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's estimate of the data, and the logits if there is a discriminator."""
        if self.judge is not None:
            return self.judge.estimate(x, t, condition, gradient=self.gan_weight > 0)
        with torch.no_grad(), evaluating(model_inside(self.teacher)):
            return self.teacher.denoise(x, t, **condition), None

    @torch.no_grad()
    def _weigh(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], logits: Tensor | None
    ) -> Tensor:
        """The divergence's weight of each sample."""
        if self.divergence.constant:
            return t.new_ones(t.shape)
        if self.ratio is not None:
            logits = self.ratio(x, t, **condition)
        assert logits is not None
        return self.weights(self.clip(logits), t, self.divergence)

    def _place(self, device: torch.device) -> None:
        inside = model_inside(self.teacher)
        if inside is not None and device_of(inside) != device:
            inside.to(device)

    def _judge(self, judged: bool, features: Any, discriminator: nn.Module | None) -> Judge | None:
        """The discriminator where there is use for one, after a look at the data."""
        if self.data is None:
            several = len(self.generator.starts) > 1 and not self.generator.simulate
            if judged or several or self.model.conditional:
                raise ValueError(_lacking(judged, several))
            return None
        inside = model_inside(self.teacher)
        device = device_of(inside) if inside is not None else torch.device("cpu")
        pairs = self.data.draw(Draw.of(2, generator=torch.Generator(device)))
        self.model.check(pairs.target, **pairs.condition)
        if not judged:
            return None
        judge = Judge(self.teacher, features)
        if discriminator is None:
            t = pairs.target.new_full((2,), 0.5)
            seen = judge.look(pairs.target, t, pairs.condition)
            discriminator = Discriminator([tuple(feature.shape[1:]) for feature in seen])
        judge.discriminator = discriminator
        return judge


FDistill = DistributionMatching
"""The name of the paper's method."""


def matching_gradient(
    x: Float[Tensor, "b *dims"],
    fake: Float[Tensor, "b *dims"],
    teacher: Float[Tensor, "b *dims"],
    weights: Float[Tensor, " b"],
) -> Float[Tensor, "b *dims"]:
    """The direction that descent follows: `(fake - teacher) weights / mean|x - teacher|`.

    It points from the teacher's estimate of the data to the fake flow's, so a step down goes to
    the teacher's. The mean is over the dimensions of a sample, in float32 at least.

    Args:
        x: the generator's samples.
        fake: the fake flow's estimates of the data at the noised samples.
        teacher: the teacher's.
        weights: of the divergence, of mean one.

    Example:
        >>> one = torch.ones(1, 2)
        >>> matching_gradient(3 * one, 2 * one, one, torch.ones(1))
        tensor([[0.5000, 0.5000]])

    Source: arXiv 2502.15681, theorem 1, with the normalisation of arXiv 2311.18828, equation 8.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    far = (x.detach().to(exact) - teacher.detach().to(exact)).abs().flatten(1).mean(1)
    difference = fake.detach() - teacher.detach()
    return difference * expand(weights / (far + TINY), x).to(x.dtype)


def matching_loss(
    x: Float[Tensor, "b *dims"], gradient: Float[Tensor, "b *dims"]
) -> Float[Tensor, ""]:
    """A loss whose gradient in x is `gradient / x.numel()`: `mean (x - (x' - gradient))² / 2`.

    Here x' is x without a gradient; the two cancel exactly, so nothing is lost to rounding.

    Example:
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> matching_loss(x, torch.tensor([[1.0, -2.0]])).backward(); x.grad
        tensor([[ 0.5000, -1.0000]])
    """
    return 0.5 * (x - x.detach() + gradient.detach()).square().mean()


def _start(
    teacher: Any, student: FlowModel | None, fake: FlowModel | None
) -> tuple[FlowModel, FlowModel]:
    """The generator and the fake flow at the start of training, copies both."""
    if not (hasattr(teacher, "path") and hasattr(teacher, "denoise")):
        raise ValueError(
            f"the teacher must be a field with a path and denoise, got {type(teacher).__name__}: "
            "wrap a network as FlowModel(net, path, prediction)"
        )
    refuse_memory(teacher, "the teacher is asked at times drawn anew")
    inside = model_inside(teacher)
    chosen = student if student is not None else inside
    if chosen is None:
        raise ValueError(
            f"{type(teacher).__name__} has no network to start the student from: give student="
        )
    check_start(chosen)
    learner = fake if fake is not None else inside if inside is not None else chosen
    shape = chosen.shape if inside is None else inside.shape
    if chosen.shape is None or chosen.shape != shape:
        raise ValueError(
            f"the student makes samples of shape {chosen.shape}, the teacher of {shape}: they must "
            "be known and equal"
        )
    if learner.path != teacher.path:
        raise ValueError(
            f"the fake flow is on the path {learner.path}, the teacher on {teacher.path}: their "
            "estimates are compared at the same states, so give fake= on the teacher's path"
        )
    return student_of(chosen), copy.deepcopy(learner).requires_grad_(True).train()


def _coupling(data: Any) -> Coupling | None:
    return data if data is None or hasattr(data, "draw") else Independent(data)


def _lacking(judged: bool, several: bool) -> str:
    """Why data are needed."""
    if judged:
        return (
            "the discriminator needs real data: give data, or take divergence='rkl' (or a known "
            "ratio) with gan_weight=0"
        )
    if several:
        return "later steps are fed with noised real data: give data, or pass simulate=True"
    return "the student takes labels, which come with the data: give data"
