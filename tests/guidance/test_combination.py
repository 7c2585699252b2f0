"""Weights of views and the variance of their mean: the invariants of the specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rectiflow.guidance.combination import (
    Balance,
    ClassSimilarity,
    balanced_weights,
    min_norm_weights,
    rectified,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(noises: Tensor, weights: Tensor) -> Tensor:
    """The released formula, sample by sample and pair by pair."""
    found = []
    for e, a in zip(noises.transpose(0, 1), weights.T):
        variance = float((a * a).sum())
        for i in range(len(e)):
            for j in range(i):
                variance += 2 * float(a[i] * a[j] * (e[i] * e[j]).mean())
        found.append(sum(a[i] * e[i] for i in range(len(e))) / math.sqrt(variance))
    return torch.stack(found)


# oracle


def test_official_rectification_is_the_formula() -> None:
    for views in (2, 3):
        noises = draw(views, 4, 1, 6, 6) + 0.5 * draw(1, 4, 1, 6, 6, seed=1)
        weights = draw(views, 4, seed=2).softmax(0)
        found = rectified(noises, weights, "official")
        torch.testing.assert_close(found, by_hand(noises, weights))


def test_matched_rectification_keeps_the_mean_square() -> None:
    """Invariant 9."""
    noises, weights = 0.6 * draw(3, 4, 1, 6, 6), draw(3, 4, seed=2).softmax(0)
    found = rectified(noises, weights, "matched").square().flatten(1).mean(1)
    wanted = (weights * noises.square().flatten(2).mean(2)).sum(0)
    torch.testing.assert_close(found, wanted)


def test_independent_noises_gain_the_root_of_two_and_equal_ones_nothing() -> None:
    """Invariant 5, at 100,000 numbers a sample."""
    noises = draw(2, 1, 100_000)
    plain = rectified(noises, None, "none")
    for kind in ("official", "matched"):
        ratio = float((rectified(noises, None, kind) / plain).mean())
        assert ratio == pytest.approx(math.sqrt(2), rel=0.01)
        same = rectified(noises[:1].expand(2, -1, -1), None, kind)
        assert float((same / noises[0]).mean()) == pytest.approx(1, rel=0.01)


def test_equal_noises_of_little_variance_are_amplified_by_official_alone() -> None:
    same = 0.5 * draw(1, 1, 100_000).expand(2, -1, -1)
    torch.testing.assert_close(rectified(same, None, "matched"), same[0])
    ratio = float((rectified(same, None, "official") / same[0]).mean())
    # 1/4 + 1/4 + 2/4 · 1/4
    assert ratio == pytest.approx(0.625**-0.5, rel=0.01)


def test_balanced_weights_by_hand() -> None:
    scores = torch.tensor([[0.2], [0.4]])
    share = torch.tensor([0.5])
    first = 0.2**-1.5 / (0.2**-1.5 + 0.4**-1.5)
    torch.testing.assert_close(balanced_weights(scores, share)[0], torch.tensor([first]))


def test_min_norm_of_two_is_where_the_segment_is_nearest_to_the_origin() -> None:
    a, b = draw(2, 5, 7)
    share = ((b - a) * b).sum(1) / (b - a).square().sum(1)
    found = min_norm_weights(torch.stack([a, b]))
    torch.testing.assert_close(found[0], share.clamp(0, 1))


def test_min_norm_of_four_is_not_longer_than_any_mean_tried() -> None:
    vectors = draw(4, 3, 5)
    weights = min_norm_weights(vectors)
    shortest = (weights[..., None] * vectors).sum(0).norm(dim=1)
    tried = -torch.rand(20_000, 4, generator=torch.Generator().manual_seed(1)).double().log()
    tried = tried / tried.sum(1, keepdim=True)
    least = torch.einsum("nv,vbd->nbd", tried, vectors).norm(dim=2).amin(0)
    assert (shortest <= least).all()


# limit


def test_one_view_is_left_alone() -> None:
    """Invariant 2."""
    noise = draw(1, 3, 4)
    for kind in ("none", "official", "matched"):
        torch.testing.assert_close(rectified(noise, None, kind), noise[0])
    assert torch.equal(balanced_weights(torch.full((1, 3), 0.2), 0.5), torch.ones(1, 3))
    assert torch.equal(min_norm_weights(noise), torch.ones(1, 3).double())


def test_weights_sum_to_one_and_equal_scores_weigh_the_same() -> None:
    """Invariant 4."""
    scores = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    found = balanced_weights(scores, torch.linspace(0, 1, 5))
    torch.testing.assert_close(found.sum(0), torch.ones(5))
    equal = balanced_weights(torch.full((3, 5), 0.3), 1.0)
    torch.testing.assert_close(equal, torch.full((3, 5), 1 / 3))
    at_first = balanced_weights(scores, 0.0)
    torch.testing.assert_close(at_first * scores, (at_first * scores)[:1].expand(3, -1))


def test_scores_below_the_floor_are_lifted_to_it() -> None:
    scores = torch.tensor([[-0.2, 0.0], [1e-3, 0.5]])
    found = balanced_weights(scores, 0.0)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.5, 0.5]))
    assert found.isfinite().all()


# property


def test_order_of_views_does_not_matter() -> None:
    """Invariant 7."""
    noises, scores = draw(3, 4, 6), draw(3, 4).abs()
    order = [2, 0, 1]
    torch.testing.assert_close(
        balanced_weights(scores, 0.3)[order], balanced_weights(scores[order], 0.3)
    )
    weights = balanced_weights(scores, 0.3)
    for kind in ("official", "matched"):
        torch.testing.assert_close(
            rectified(noises, weights, kind), rectified(noises[order], weights[order], kind)
        )
    found, turned = min_norm_weights(noises), min_norm_weights(noises[order])
    # Rounds go through the pairs in their order, so they end a little apart.
    torch.testing.assert_close(found[order], turned, rtol=1e-3, atol=1e-3)


def test_half_precision_and_zeros_stay_finite() -> None:
    noises = draw(2, 3, 4).bfloat16()
    for kind in ("official", "matched"):
        assert rectified(noises, None, kind).dtype == torch.bfloat16
        assert rectified(0 * noises, None, kind).isfinite().all()
        # Opposite ones, whose mean is nothing.
        assert rectified(torch.stack([noises[0], -noises[0]]), None, kind).isfinite().all()
    assert min_norm_weights(0 * noises).isfinite().all()


def test_balance_looks_at_data_or_at_states_and_times() -> None:
    seen = []

    def score(picture: Tensor, **given: object) -> Tensor:
        seen.append(sorted(given))
        return picture.flatten(1).mean(1)

    pictures = [torch.full((2, 1, 2, 2), 0.2), torch.full((2, 1, 2, 2), 0.6)]
    t = torch.zeros(2)
    conditions = [{"label": torch.zeros(2)}] * 2
    for on, names in (("data", ["label"]), ("state", ["label", "t"])):
        found = Balance(score, on).weights(pictures, t, conditions, 0.0)
        torch.testing.assert_close(found[0], torch.full((2,), 0.75))
        assert seen[-1] == names
    with pytest.raises(ValueError, match=r"one number for each of the 2 samples, got shape \(\)"):
        Balance(lambda x, label: x.mean()).weights(pictures, t, conditions, 0.0)
    with pytest.raises(ValueError, match="did you mean 'state'"):
        Balance(score, "states")
    with pytest.raises(ValueError, match="floor must be > 0"):
        Balance(score, floor=0.0)


def test_similarity_of_classes() -> None:
    logits = torch.log(torch.tensor([[0.9, 0.1]]))
    label = torch.tensor([1])
    found = ClassSimilarity(lambda x: logits)(torch.zeros(1, 1), label=label)
    assert found.item() == pytest.approx(0.73)
    timed = ClassSimilarity(lambda x, t: t[:, None] * logits)
    found = timed(torch.zeros(1, 1), label=label, t=torch.zeros(1))
    assert found.item() == pytest.approx(0.85)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'matched'"):
        rectified(draw(2, 1, 3), None, "match")
