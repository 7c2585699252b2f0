"""Relation rectification: a graph gives back the order that a bag of words has lost.

Two coloured squares stand for "X left of Y", a sum of word vectors for a contrastive text encoder,
and a small flow for Stable Diffusion: told the order by a hidden direction of the text, it obeys;
the text encoder never tells it.

Source: arXiv 2403.20249, at the scale of pictures of 6x6 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rectiflow.guidance.relation_prompts import PROMPTS
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.relation_lab import (
    ARMS,
    FULL,
    SYMMETRIC,
    Fitted,
    Found,
    Lab,
    Settings,
)
from rectiflow.recipes.tools import stage
from rectiflow.training.figures import bands, compare_samples
from rectiflow.training.runs import Run

CLAIM = (
    "A graph network that shifts the end of a sentence makes a frozen model obey the order of two "
    "objects, learned from a handful of pictures; without the direction of the graph's edges it "
    "cannot."
)
FROZEN, ORACLE = "frozen model", "oracle"
ACCURACY, UNSEEN = "accuracy of the order", "accuracy of the order, colours never fitted"
SHOWN = "share of pictures with both squares right"
CHANCE = 0.5
PRESETS = {
    "quick": Settings(
        pictures=400,
        width=32,
        depth=1,
        flow=stage(20, batch_size=32),
        least_oracle=0.0,
        hidden=8,
        iterations=2,
        batch_size=2,
        samples=8,
        steps=4,
        seeds=(0,),
    ),
    "default": Settings(),
    # Stable Diffusion 2.1 and folders of photographs are `rectiflow relations`; here the same
    # experiment with a larger flow, more seeds and more pictures to judge by.
    "paper": Settings(
        pictures=200_000,
        width=512,
        depth=4,
        flow=stage(40_000, batch_size=256),
        samples=2000,
        steps=100,
        seeds=tuple(range(10)),
    ),
}


def run(settings: Settings, run: Run) -> Result:
    """The experiment, its checks and pictures."""
    found = []
    for seed in settings.seeds:
        lab = Lab(settings, seed)
        oracle = lab.oracle()
        found.append(Found(oracle, {arm: lab.fitted(arm) for arm in ARMS}))
    return Result(
        "rrnet",
        CLAIM,
        _numbers(found, settings),
        _checks(found),
        settings.seeds,
        _notes(settings),
        _draw(found, settings, run),
    )


def _over(found: Sequence[Found], arm: str, value: Callable[[Fitted], float]) -> tuple[float, ...]:
    """The mean of a value over the pairs of colours, one a seed."""
    return tuple(sum(value(f) for f in one.arms[arm]) / len(one.arms[arm]) for one in found)


def _worst(found: Sequence[Found], value: Callable[[Fitted], float]) -> tuple[float, ...]:
    """The largest of a value of the rectifier over the pairs of colours, one a seed."""
    return tuple(max(value(f) for f in one.arms[FULL]) for one in found)


def _mean(both: tuple[float, float]) -> float:
    return sum(both) / 2


def _numbers(found: Sequence[Found], settings: Settings) -> list[Number]:
    oracle = tuple(sum(map(_mean, one.oracle)) / len(one.oracle) for one in found)
    frozen = _over(found, FULL, lambda f: _mean(f.accuracy[0.0]))
    shown = [Number(SHOWN, ORACLE, oracle), Number(ACCURACY, FROZEN, frozen)]
    for arm in ARMS:
        for weight in settings.weights:
            values = _over(found, arm, _accuracy_at(weight))
            shown.append(Number(ACCURACY, f"{arm}, weight {weight:g}", values))
        shown.append(
            Number(ACCURACY, f"{arm}, best weight", _over(found, arm, lambda f: _mean(_best(f))))
        )
        right = _over(found, arm, lambda f: _mean(f.shown))
        shown.append(Number(SHOWN, f"{arm}, best weight", right))
        worse = _over(found, arm, lambda f: min(_best(f)))
        shown.append(Number("accuracy of the prompt that obeys less", arm, worse))
    shown.append(Number(UNSEEN, FROZEN, _over(found, FULL, lambda f: _mean(f.unseen_frozen))))
    for arm in ARMS:
        shown.append(Number(UNSEEN, arm, _over(found, arm, lambda f: _mean(f.unseen))))
    for arm in ARMS:
        for place, name in enumerate(PROMPTS):
            length = _over(found, arm, _length_at(place))
            shown.append(Number(f"length of the shift of {name}", arm, length))
        shown.append(
            Number("cosine of both ends, best weight", arm, _over(found, arm, lambda f: f.cosine))
        )
    ends = _over(found, FULL, lambda f: sum(f.ends) / len(f.ends))
    return [*shown, Number("length of an end of text", FROZEN, ends)]


def _accuracy_at(weight: float) -> Callable[[Fitted], float]:
    return lambda fitted: _mean(fitted.accuracy[weight])


def _length_at(place: int) -> Callable[[Fitted], float]:
    return lambda fitted: fitted.lengths[place]


def _best(fitted: Fitted) -> tuple[float, float]:
    """The accuracy at the best weight."""
    return fitted.accuracy[fitted.best]


def _gain(fitted: Fitted) -> float:
    """How much more often the order is right, for the prompt that gains less."""
    return min(after - before for after, before in zip(_best(fitted), fitted.accuracy[0.0]))


def _from_chance(both: tuple[float, float]) -> float:
    return abs(_mean(both) - CHANCE)


def _checks(found: Sequence[Found]) -> list[Check]:
    """The specification's rules; of the pairs of colours the worse one counts."""
    last = max(found[0].arms[FULL][0].accuracy)
    symmetric = tuple(
        max(_from_chance(f.accuracy[last]) for f in one.arms[SYMMETRIC]) for one in found
    )
    return [
        Check(
            "frozen model: distance of the accuracy from chance",
            _worst(found, lambda f: _from_chance(f.accuracy[0.0])),
            at_most=0.08,
        ),
        Check(
            "rectifier: mean accuracy of both prompts at the best weight",
            tuple(-v for v in _worst(found, lambda f: -_mean(_best(f)))),
            at_least=0.8,
            broken=0.65,
        ),
        Check(
            "rectifier: gain of the prompt that gains less",
            tuple(-v for v in _worst(found, lambda f: -_gain(f))),
            at_least=0.05,
        ),
        Check(
            "rectifier: cosine of both ends (frozen model: 1)",
            _worst(found, lambda f: f.cosine),
            at_most=0.99,
        ),
        Check(
            f"without direction, weight {last:g}: distance of the accuracy from chance",
            symmetric,
            at_most=0.08,
        ),
    ]


def _notes(settings: Settings) -> list[str]:
    pairs = ", ".join(" and ".join(pair) for pair in settings.pairs)
    return [
        f"Each of the pairs {pairs} has a rectifier of its own, fitted on {settings.few} pictures "
        "of each prompt; colours never fitted are those of the next pair. They are reported, and "
        "no part of the verdict: a relation seen between two objects only need not be seen as one.",
        "The best weight is chosen on other noises than those it is judged by; checks count the "
        "worse pair of colours of each seed.",
        "The order is a choice between two, so that chance is one half whatever else a picture "
        "shows; the oracle must put both squares where they belong.",
        "Both sentences have the same end of text here, so without direction both prompts make "
        "pictures of the same kind; each is judged on noises of its own, or one would be right "
        "wherever the other is wrong.",
        f"Rectifiers are fitted in {settings.iterations} iterations of five steps; the "
        "specification has 150.",
        "The negative term has no bound: the lengths of the shifts say what it costs.",
    ]


def _draw(found: Sequence[Found], settings: Settings, run: Run) -> dict[Path, str]:
    """Accuracy against weight; pictures of the arms."""
    weights = [0.0, *settings.weights]
    lines = {
        arm: (weights, list(zip(*(_over(found, arm, _accuracy_at(w)) for w in weights))))
        for arm in ARMS
    }
    curves = bands(
        lines,
        run.path("accuracy.png"),
        across="weight of the shift",
        up="share of pictures in the right order",
        floor=("chance", CHANCE),
    )
    sheet = compare_samples(
        {arm: found[0].arms[arm][0].images for arm in ARMS}, run.path("pictures.png")
    )
    first, second = settings.pairs[0]
    means = {arm: _over(found, arm, lambda f: _mean(_best(f))) for arm in ARMS}
    told = ", ".join(f"{arm} {sum(v) / len(v):.0%}" for arm, v in means.items())
    return {
        curves: f"Share of pictures in the order that the prompt says. At the best weight: "
        f"{told}. Band: range of the seeds.",
        sheet: f"Eight pictures of '{first} left of {second}', then eight of '{second} left of "
        f"{first}', at each arm's best weight. Seed {settings.seeds[0]}.",
    }
