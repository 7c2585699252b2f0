"""AlignProp: reward backpropagation against policy gradients, and how many steps should be kept.

Class-conditional digits stand in for Stable Diffusion and its prompts, the log-probability of the
*next* class under a linear classifier for a reward of meaning, and the mean pixel for one of
colour. A convolutional classifier that nothing was trained on judges beside them.

Source: arXiv 2310.03739, sections 4 and 5; the baseline: arXiv 2305.13301.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rectiflow.files import cache_folder
from rectiflow.recipes.alignment_lab import (
    BEFORE,
    DIVERSITY,
    FULL,
    HELD_OUT,
    JUDGE,
    LAST,
    NORMAL,
    POLICY,
    POLICY_MORE,
    REWARD,
    UNIFORM,
    Found,
    Lab,
    Settings,
)
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import stage
from rectiflow.training.data import load
from rectiflow.training.evaluation import load_features
from rectiflow.training.figures import bands, compare_samples
from rectiflow.training.report import cell
from rectiflow.training.runs import Run
from rectiflow.training.trainer import TrainerSettings

CLAIM = (
    "Sending a reward's gradient back through the sampler reaches with a tenth of the images what "
    "a policy gradient does; checkpoints make its memory nearly independent of the number of "
    "steps; and keeping more than the last step helps rewards of meaning."
)
PRESETS = {
    "quick": Settings(
        net_options={"width": 32, "depth": 1},
        flow=stage(40, batch_size=64),
        chain=4,
        updates=3,
        batch_size=16,
        policy_rates=(1e-3,),
        policy_factor=2,
        samples=40,
        memory_net="mlp-digits",
        memory_steps=(2, 4),
        seeds=(0,),
    ),
    "default": Settings(),
    # Stable Diffusion with the aesthetic and preference rewards is `rectiflow align` on its folder;
    # here the same experiment on larger images and a U-Net.
    "paper": Settings(
        data="fashion-mnist",
        net="unet-s",
        net_options={},
        flow=TrainerSettings(steps=60_000, batch_size=128),
        chain=50,
        updates=400,
        batch_size=128,
        samples=5000,
        memory_batch=16,
    ),
}


def run(settings: Settings, run: Run) -> Result:
    """The experiments, their checks and pictures."""
    images, held = (load(settings.data, split=s) for s in ("train", "test"))
    features = load_features(images, held, kind="classifier", cache=cache_folder())
    found = []
    for seed in settings.seeds:
        lab = Lab(settings, images, features.net, seed)
        difference, memory = lab.checkpoints()
        found.append(Found(lab.meaning(), lab.colour(), difference, memory))
    return Result(
        "alignprop",
        CLAIM,
        _numbers(found, settings),
        _checks(found),
        settings.seeds,
        _notes(settings),
        _draw(found, settings, run),
    )


def _scores(found: Sequence[Found], arm: str, name: str = REWARD) -> tuple[float, ...]:
    return tuple(one.meaning[arm].scores[name] for one in found)


def _less(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(above, below))


def _numbers(found: Sequence[Found], settings: Settings) -> list[Number]:
    few, many = settings.memory_steps
    shown = [
        Number(f"meaning: {name}", arm, _scores(found, arm, name))
        for name in (REWARD, HELD_OUT, JUDGE, DIVERSITY)
        for arm in found[0].meaning
    ]
    for arm in found[0].colour:
        shown.append(Number("colour: reward", arm, tuple(one.colour[arm] for one in found)))
    for keep, arm in ((True, "checkpoints"), (False, "no checkpoints")):
        values = tuple(one.memory[keep][1] / one.memory[keep][0] for one in found)
        shown.append(Number(f"peak memory, {many} steps / {few} steps", arm, values))
    return shown


def _checks(found: Sequence[Found]) -> list[Check]:
    """The specification's rules; a tie, within a hundredth of a nat, is no success."""
    ours = _scores(found, NORMAL)
    more = tuple(map(min, ours, _scores(found, UNIFORM)))
    spread, gained = [], []
    for one in found:
        ends = [one.colour[arm] for arm in (LAST, NORMAL, UNIFORM)]
        spread.append(max(ends) - min(ends))
        gained.append(max(ends) - one.colour[BEFORE])
    return [
        Check(
            "backpropagation - REINFORCE on as many images, reward of meaning",
            _less(ours, _scores(found, POLICY)),
            at_least=0.01,
        ),
        Check(
            "backpropagation - REINFORCE on more images, reward of meaning",
            _less(ours, _scores(found, POLICY_MORE)),
            at_least=0.01,
        ),
        Check(
            "largest difference of gradients with and without checkpoints",
            tuple(one.difference for one in found),
            at_most=1e-6,
        ),
        Check(
            "peak memory with checkpoints, many steps / few",
            tuple(one.memory[True][1] / one.memory[True][0] for one in found),
            at_most=1.3,
        ),
        Check(
            "gain on classes that alignment never asked for",
            _less(_scores(found, NORMAL, HELD_OUT), _scores(found, BEFORE, HELD_OUT)),
            at_least=0.01,
        ),
        Check(
            "more steps in the graph (normal and uniform) - last step, reward of meaning",
            _less(more, _scores(found, LAST)),
            at_least=0.2,
            broken=0.0,
        ),
        Check(
            "reward of colour: spread of the rules / gain",
            tuple(s / g if g > 0 else float("nan") for s, g in zip(spread, gained)),
            at_most=0.05,
            broken=0.2,
        ),
    ]


def _notes(settings: Settings) -> list[str]:
    images = settings.updates * settings.batch_size
    rates = ", ".join(f"{rate:g}" for rate in settings.policy_rates)
    return [
        f"Backpropagation sees {images:,} images, the longer policy gradient "
        f"{settings.policy_factor} times as many; of its rates ({rates}) and of the two samplers "
        "it may be judged by, each seed counts the best.",
        "The policy gradient is the score-function form, one update a batch; reusing batches by "
        "clipped importance weights is not part of it.",
        f"Memory is that of {settings.memory_net} in batches of {settings.memory_batch}: each step "
        "adds one state, so a network whose activations are not much larger than its samples "
        "(an MLP on digits) would grow faster.",
        "The judge is a convolutional classifier that no reward was made of.",
    ]


def _draw(found: Sequence[Found], settings: Settings, run: Run) -> dict[Path, str]:
    """Rewards against images seen; samples of the arms from the same noises."""
    size = settings.batch_size
    lines = {}
    for arm, first in found[0].meaning.items():
        if first.curve and arm != POLICY:
            across = [size * (i + 1) for i in range(len(first.curve))]
            lines[arm] = (across, [one.meaning[arm].curve for one in found])
    curves = bands(
        lines,
        run.path("rewards.png"),
        across="images seen",
        up="reward of the training samples (nats)",
        logarithmic="",
    )
    arms = (BEFORE, LAST, NORMAL, FULL, POLICY, POLICY_MORE)
    sheet = compare_samples(
        {arm: found[0].meaning[arm].images for arm in arms}, run.path("samples.png")
    )
    means = {
        arm: cell(sum(_scores(found, arm)) / len(found))
        for arm in (BEFORE, LAST, NORMAL, UNIFORM, FULL, POLICY, POLICY_MORE)
    }
    told = ", ".join(f"{arm} {value}" for arm, value in means.items())
    return {
        curves: f"Log-probability of the next class during alignment. In the end: {told}. Band: "
        "range of the seeds.",
        sheet: "The same noises and labels: every digit should become the one after it. Seed "
        f"{settings.seeds[0]}.",
    }
