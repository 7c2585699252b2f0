"""The contrastive loss: both terms by hand, on the same noises and times, in every space."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.guidance.relations import CHANNELS, TOKENS, model

from rectiflow.flows import VariancePreservingPath
from rectiflow.flows.paths import PREDICTIONS
from rectiflow.guidance import PairContrastiveDenoising


def batch(count: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "pictures": normal(count, 2, 2),
        "noise": normal(count, 2, 2),
        "t": torch.rand(count, generator=generator) * 0.8 + 0.1,
        "condition": {"context": normal(2 * count, TOKENS, CHANNELS)},
    }


def by_hand(base: Any, given: dict[str, Any], space: str, exchanged: bool) -> torch.Tensor:
    """One prompt and one picture at a time."""
    found = []
    for row, t in enumerate(given["t"]):
        errors = []
        for half in (0, 1):
            target = given["pictures"][row, 1 - half if exchanged else half][None]
            source, time = given["noise"][row, half][None], t[None]
            x = base.path.interpolate(source, target, time)
            output = base(x, time, context=given["condition"]["context"][2 * row + half][None])
            output = base.path.convert(output, x, time, given=base.prediction, wanted=space)
            wanted = base.path.target_of(space, source, target, time)
            errors.append((output - wanted).square().mean())
        found.append(sum(errors) / 2)
    return torch.stack(found)


@pytest.mark.parametrize("path", [None, VariancePreservingPath()])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_both_terms_are_those_of_what_the_model_predicts(path, prediction: str) -> None:
    base, given = model(prediction, path=path), batch()
    found = PairContrastiveDenoising(10.0, 2.0)(base, **given)
    positive = by_hand(base, given, prediction, exchanged=False)
    negative = by_hand(base, given, prediction, exchanged=True)
    torch.testing.assert_close(found.positive, positive)
    torch.testing.assert_close(found.negative, negative)
    torch.testing.assert_close(found.total, 10 * positive - 2 * negative)


@pytest.mark.parametrize("space", PREDICTIONS)
def test_errors_are_measured_in_the_space_asked_for(space: str) -> None:
    base, given = model("data", path=VariancePreservingPath()), batch()
    found = PairContrastiveDenoising(1.0, 1.0, space=space)(base, **given)
    torch.testing.assert_close(found.positive, by_hand(base, given, space, exchanged=False))


def test_errors_of_v_are_those_of_data_over_the_noise() -> None:
    """Why a network trained on v is not fitted on the data that its reading turns it into."""
    base, given = model("data", path=VariancePreservingPath()), batch()
    in_v, in_data = (
        PairContrastiveDenoising(1.0, 0.0, space=space)(base, **given).positive
        for space in ("v", "data")
    )
    torch.testing.assert_close(in_v * base.path.sigma(given["t"]).square(), in_data)


def test_both_terms_share_noises_and_times_and_one_call() -> None:
    base, given = model(), batch()
    PairContrastiveDenoising()(base, **given)
    (seen,) = base.net.seen
    own, other = seen["x"].unflatten(0, (2, 3, 2))
    t = given["t"][:, None, None]
    noise = (1 - t) * given["noise"]
    torch.testing.assert_close(own - t * given["pictures"], noise)
    torch.testing.assert_close(other - t * given["pictures"].flip(1), noise)
    assert torch.equal(seen["t"], given["t"].repeat_interleave(2).repeat(2))
    assert torch.equal(seen["context"], given["condition"]["context"].repeat(2, 1, 1))


def test_without_the_negative_term_it_is_a_positive_loss_of_half_the_evaluations() -> None:
    base, given = model(), batch()
    found = PairContrastiveDenoising(3.0, 0.0)(base, **given)
    assert found.negative is None
    assert torch.equal(found.total, 3 * found.positive)
    assert [len(seen["x"]) for seen in base.net.seen] == [6]
    both = PairContrastiveDenoising(3.0, 1.0)(base, **given)
    torch.testing.assert_close(found.positive, both.positive)


def test_the_hinge_pushes_until_the_margin_only() -> None:
    loss = PairContrastiveDenoising(10.0, 2.0, hinge=0.5)
    positive = torch.tensor([0.2, 0.2, 0.2], requires_grad=True)
    negative = torch.tensor([0.3, 0.8, 5.0], requires_grad=True)
    found = loss.combine(positive, negative)
    # Margins of 0.1, 0.6 and 4.8.
    torch.testing.assert_close(found.total, torch.tensor([2.0 + 2 * 0.4, 2.0, 2.0]))
    found.total.sum().backward()
    assert negative.grad is not None
    assert negative.grad.tolist() == pytest.approx([-2, 0, 0])
    free = replace(loss, hinge=None).combine(positive, negative)
    torch.testing.assert_close(free.total, 10 * positive - 2 * negative)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lambda_pos": -1.0}, "lambda_pos must be >= 0, got -1.0"),
        ({"lambda_neg": float("nan")}, "lambda_neg must be >= 0, got nan"),
        ({"lambda_neg": float("inf")}, "lambda_neg must be finite"),
        ({"lambda_pos": 0.0, "lambda_neg": 0.0}, "nothing to learn"),
        ({"hinge": 0.0}, "hinge must be > 0"),
        ({"cap": -1.0}, "cap must be > 0"),
        ({"space": "velocty"}, "did you mean 'velocity'"),
    ],
)
def test_wrong_weights(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairContrastiveDenoising(**options)
