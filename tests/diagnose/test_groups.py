"""Groups of samples against brute force."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectiflow.diagnose import Groups, alternation, extremes, matched_groups, random_groups
from rectiflow.diagnose.groups import label_counts, shuffled


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.data())
def test_extremes_by_brute_force_with_ties(changes: list[int], draw: st.DataObject) -> None:
    size = draw.draw(st.integers(1, len(changes) // 2))
    groups = extremes(torch.tensor(changes, dtype=torch.float64), size)
    numbers = range(len(changes))
    # Among equals the lowest number: that is what sorting by (value, number) gives.
    plus = sorted(numbers, key=lambda i: (-changes[i], i))[:size]
    assert groups.plus.tolist() == plus
    rising = sorted(set(numbers) - set(plus), key=lambda i: (changes[i], i))
    assert groups.minus.tolist() == rising[:size]


def test_extremes_follow_a_permutation() -> None:
    change = torch.randn(40, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    plain, moved = extremes(change, 7), extremes(change[order], 7)
    assert torch.equal(order[moved.plus], plain.plus)
    assert torch.equal(order[moved.minus], plain.minus)


def test_alternation_sees_what_swings_and_not_what_drifts() -> None:
    steps = torch.arange(9, dtype=torch.float64)
    swinging = 0.5 * (-1) ** steps
    drifting = 3 - 0.1 * steps
    losses = torch.stack([swinging, -swinging, drifting, drifting + 2 * swinging], 1)
    # The last change of the first is upward by 1.
    found = alternation(losses)
    assert torch.allclose(found, torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64))
    assert torch.equal(alternation(losses[-2:]), losses[-1] - losses[-2])
    with pytest.raises(ValueError, match="two steps"):
        alternation(losses[:1])


def test_random_groups_have_the_same_labels_and_other_members() -> None:
    labels = torch.arange(60) % 3
    groups = Groups(torch.tensor([0, 3, 1]), torch.tensor([2, 5, 8]))
    seen = set()
    for seed in range(20):
        drawn = random_groups(groups, labels, 60, generator=torch.Generator().manual_seed(seed))
        for group, like in ((drawn.plus, groups.plus), (drawn.minus, groups.minus)):
            assert Counter(labels[group].tolist()) == Counter(labels[like].tolist())
        members = drawn.members.tolist()
        assert len(set(members)) == 6
        assert not set(members) & set(groups.members.tolist())
        seen.update(members)
    # 20 draws of 2, 1 and 3 among 18, 19 and 17: most are drawn at some time.
    assert len(seen) > 35


def test_random_groups_take_members_only_where_nothing_else_is_left() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    groups = Groups(torch.tensor([0, 3]), torch.tensor([1, 2]))
    drawn = random_groups(groups, labels, 4)
    assert sorted(labels[drawn.plus].tolist()) == [0, 1]
    assert len(set(drawn.members.tolist())) == 4
    free = random_groups(Groups(torch.tensor([0]), torch.tensor([1])), None, 4)
    assert sorted(free.members.tolist()) == [2, 3]


def test_equal_changes_make_two_groups() -> None:
    groups = extremes(torch.zeros(6), 3)
    assert (groups.plus.tolist(), groups.minus.tolist()) == ([0, 1, 2], [3, 4, 5])


def test_random_groups_share_samples_of_labels_that_run_out() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    both = torch.tensor([0, 1])
    drawn = random_groups(Groups(both, both), labels, 6)
    assert sorted(drawn.plus.tolist()) == sorted(drawn.minus.tolist()) == [0, 1]


def test_shuffled_groups_deal_all_members_anew() -> None:
    groups = Groups(torch.arange(4), torch.arange(10, 14))
    dealt = [shuffled(groups, torch.Generator().manual_seed(seed)) for seed in range(30)]
    for one in dealt:
        assert sorted(one.members.tolist()) == [*range(4), *range(10, 14)]
        assert len(one.plus) == len(one.minus) == 4
    low = [int((one.plus < 10).sum()) for one in dealt]
    # Half of each group comes from each side, on average; 30 draws are known to 0.13.
    assert sum(low) / 30 == pytest.approx(2, abs=0.6)
    assert len(set(low)) > 1


def test_matched_groups_have_the_nearest_losses() -> None:
    losses = torch.tensor([1.0, 5.0, 1.1, 4.0, 9.0, 1.2])
    found = matched_groups(Groups(torch.tensor([0]), torch.tensor([1, 2])), losses)
    assert found.plus.tolist() == [5]
    # 1.2 is taken, so what is left for 1.1 is 4.0 or 9.0; 5.0 came first and took 4.0.
    assert found.minus.tolist() == [3, 4]
    with pytest.raises(ValueError, match="as many others"):
        matched_groups(Groups(torch.tensor([0, 1]), torch.tensor([2, 3])), losses)


def test_labels_are_counted() -> None:
    labels = torch.tensor([7, 1, 7, 2, 1])
    assert list(label_counts(torch.tensor([0, 1, 2, 3, 4]), labels).items()) == [
        (1, 2), (7, 2), (2, 1),
    ]  # fmt: skip
    assert label_counts(torch.tensor([0]), None) == {}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="two groups of 3 need 6 samples, got 5"):
        extremes(torch.zeros(5), 3)
    with pytest.raises(ValueError, match="size must be > 0"):
        extremes(torch.zeros(5), 0)
