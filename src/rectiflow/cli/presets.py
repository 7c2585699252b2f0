"""Sizes of the demo's stages by image size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rectiflow.distill.chain import ChainSettings


def chain_settings(shape: tuple[int, ...], preset: str) -> ChainSettings:
    """The stages of the demo for images of a shape: minutes on two cores, or seconds (quick)."""
    from rectiflow.distill.chain import ChainSettings, TeacherSettings
    from rectiflow.nets import preset_for
    from rectiflow.training.optimizers import OptimizerSettings
    from rectiflow.training.trainer import TrainerSettings

    def stage(steps: int, rate: float, batch_size: int) -> TrainerSettings:
        return TrainerSettings(
            steps=steps,
            batch_size=batch_size,
            ema=0.999,
            checkpoint_every=1000,
            optim=OptimizerSettings(learning_rate=rate, schedule="cosine", warmup=100),
        )

    if preset == "quick":
        return ChainSettings(
            net="mlp-2d",
            flow=stage(40, 1e-3, 64),
            pairs=TeacherSettings(count=256, steps=20, batch_size=256),
            reflow=stage(20, 5e-4, 64),
            distil=stage(20, 5e-4, 64),
        )
    net = preset_for(shape)
    if max(shape[-2:]) <= 12:
        return ChainSettings(
            net=net,
            flow=stage(4000, 1e-3, 128),
            pairs=TeacherSettings(count=20_000, solver="heun", steps=40, straight_steps=10),
            reflow=stage(3000, 5e-4, 128),
            distil=stage(2000, 3e-4, 128),
        )
    return ChainSettings(
        net=net,
        flow=stage(5000, 1e-3, 64),
        pairs=TeacherSettings(
            count=10_000, solver="heun", steps=25, straight_steps=10, batch_size=500
        ),
        reflow=stage(3000, 5e-4, 64),
        distil=stage(2000, 3e-4, 64),
    )
