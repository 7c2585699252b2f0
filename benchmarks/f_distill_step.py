"""What does a step of distribution matching cost beyond the networks' passes that it is made of?"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

import harness
from harness import Rounds
from rectiflow.distill import Discriminator, DistributionMatching
from rectiflow.distill.density_ratio import default_features
from rectiflow.flows import FlowModel
from rectiflow.nets import build, sizes
from rectiflow.training import Trainer, TrainerSettings
from training_step import BARE, OURS, Alternating

CASES = (("mlp-digits", 256, 3), ("unet-xs", 32, 1))


def parts(net: nn.Module, data: Tensor, batch: int) -> Callable[[], None]:
    """One step's passes and optimizers, by hand, on the rectified path.

    Student: sample, teacher and fake flow at a noised sample, logits, backward. Fake flow: sample,
    forward, backward. Discriminator: teacher at fakes and reals, forward, backward.
    """
    teacher = copy.deepcopy(net).eval().requires_grad_(False)
    student, fake = copy.deepcopy(net).train(), copy.deepcopy(net).train()
    seen: list[Tensor] = []
    teacher.get_submodule(default_features(teacher)).register_forward_hook(
        lambda module, given, output: seen.append(output)
    )
    zero, softplus = torch.zeros(batch), nn.functional.softplus
    teacher(data[:2], zero[:2])
    judge = Discriminator([seen.pop().shape[1:]])
    modules = (student, fake, judge)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3, fused=True) for m in modules]
    live = [p.detach() for p in student.parameters()]
    average = [p.clone() for p in live]

    def at(target: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(
            torch.randn_like(target), target, t.reshape(-1, *(1,) * (target.ndim - 1))
        )

    def finish(index: int, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(modules[index].parameters(), 1.0)
        optimizers[index].step()
        optimizers[index].zero_grad(set_to_none=True)

    def step() -> None:
        real = data[torch.randint(len(data), (batch,))]
        z, t = torch.randn_like(real), torch.rand(batch)
        x = z + student(z, zero)
        with torch.no_grad():
            x_t = at(x.detach(), t)
            wanted = x_t + (1 - t).reshape(-1, *(1,) * (x.ndim - 1)) * teacher(x_t, t)
            found = x_t + (1 - t).reshape(-1, *(1,) * (x.ndim - 1)) * fake(x_t, t)
            ratio = judge([seen.pop()]).clamp(-10, 10).exp().clamp(0.1, 20)
            h = ratio / (ratio + 1)
            far = (x - wanted).abs().flatten(1).mean(1)
            weight = (h / h.mean() / (far + 1e-6)).reshape(-1, *(1,) * (x.ndim - 1))
        finish(0, 0.5 * (x - x.detach() + (found - wanted) * weight).square().mean())
        with torch.no_grad():
            made = z + student(z, zero)
        noise = torch.randn_like(made)
        x_t = torch.lerp(noise, made, t.reshape(-1, *(1,) * (made.ndim - 1)))
        finish(1, nn.functional.mse_loss(fake(x_t, t), made - noise))
        with torch.no_grad():
            teacher(torch.cat([at(made, t), at(real, t)]), torch.cat([t, t]))
        false, true = judge([seen.pop()]).chunk(2)
        finish(2, softplus(false).mean() + softplus(-true).mean())
        with torch.no_grad():
            torch._foreach_lerp_(average, live, 0.001)

    return step


def compare(size: str, batch: int, *, block: int, rounds: int = 21) -> harness.Row:
    """The method in a trainer, all three phases in every step, against its parts."""
    shape = sizes[size].shape
    data = torch.randn(4 * batch, *shape)
    net = build(size, shape=shape)

    def collect() -> Rounds:
        alternating = Alternating(parts(net, data, batch), block)
        teacher = FlowModel(copy.deepcopy(net), shape=shape)
        method = DistributionMatching(teacher, data, gan_weight=0.0, student_every=1)
        settings = TrainerSettings(steps=block * (rounds + 3), batch_size=batch)
        try:
            Trainer(method, settings, title=size, callbacks=[alternating]).fit()
        finally:
            gc.enable()
        return alternating.rounds()

    found = harness.trusted(collect, floor=BARE)
    return harness.ratio(f"{size}, batch {batch}", found, OURS, BARE, target=1.05)


def main() -> bool:
    harness.one_thread()
    rows = [compare(size, batch, block=block) for size, batch, block in CASES]
    return harness.report("f_distill_step", __doc__ or "", rows, packages=("torch", "accelerate"))


if __name__ == "__main__":
    harness.finish(main)
