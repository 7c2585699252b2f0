"""What each of two processes does in test_matching_distributed.py: `python FILE FOLDER BATCH`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rectiflow.distill import DistributionMatching
from rectiflow.flows import FlowModel
from rectiflow.nets import MLP
from rectiflow.training import Trainer, TrainerSettings

DATA = torch.randn(300, 2, generator=torch.Generator().manual_seed(5)) + 1


def main(folder: Path, batch_size: int) -> None:
    """Train a few steps and keep weights, bins and the last weights of samples."""
    torch.manual_seed(0)
    teacher = FlowModel(MLP(shape=(2,), width=16, depth=1, zero=False), shape=(2,))
    method = DistributionMatching(teacher, DATA, divergence="kl", student_every=2, gan_weight=0.1)
    seen: list[torch.Tensor] = []
    method.weights.register_forward_hook(lambda module, given, found: seen.append(found))
    # The start's discriminator is silent; let it tell samples apart from the first step.
    for p in method.judge.discriminator.parameters():
        torch.nn.init.normal_(p, std=0.5)
    trainer = Trainer(method, TrainerSettings(steps=5, batch_size=batch_size, ema=0.5))
    model = trainer.fit()
    rank = trainer.accelerator.process_index
    state = {
        "model": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "judge": torch.cat([p.detach().flatten() for p in method.judge.discriminator.parameters()]),
        "means": method.weights.means,
        "weights": torch.stack(seen),
    }
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / f"{trainer.accelerator.num_processes}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
