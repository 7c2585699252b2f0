"""Which samples a step moved most, and samples to compare them with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Two groups of samples, by their numbers.

    Attributes:
        plus: those whose losses rose most, the most first.
        minus: those whose losses fell most.
    """

    plus: Int[Tensor, " k"]
    minus: Int[Tensor, " k"]

    @property
    def members(self) -> Int[Tensor, " m"]:
        """Both together."""
        return torch.cat([self.plus, self.minus])


def group_size(count: int) -> int:
    """The usual size of a group among so many samples: half a percent, but 10 or more.

    Example:
        >>> group_size(1000), group_size(10_000), group_size(12)
        (10, 50, 6)
    """
    return min(max(10, count // 200), count // 2)


def extremes(change: Float[Tensor, " n"], size: int) -> Groups:
    """The samples with the largest change and, of the others, those with the smallest.

    Among equals the first ones.

    Args:
        change: one number a sample, such as the change of its loss over a step.
        size: samples a group.

    Raises:
        ValueError: two groups of this size are more than all samples.

    Example:
        >>> groups = extremes(torch.tensor([0.1, -3.0, 2.0, 2.0, 0.0]), 2)
        >>> groups.plus.tolist(), groups.minus.tolist()
        ([2, 3], [1, 4])
    """
    positive("size", size)
    if 2 * size > len(change):
        raise ValueError(
            f"two groups of {size} need {2 * size} samples, got {len(change)}: enlarge the probe "
            "or lower the size"
        )
    falling = change.sort(descending=True, stable=True).indices
    rising = change.sort(stable=True).indices
    left = rising[~torch.isin(rising, falling[:size])]
    return Groups(falling[:size], left[:size])


def alternation(losses: Float[Tensor, "w n"]) -> Float[Tensor, " n"]:
    """How strongly each loss goes up and down from step to step; positive where it rose last.

    The alternating sum of the changes over their number. Slow trends cancel. At the edge of
    stability losses alternate with period 2, so consecutive steps are needed.

    Args:
        losses: the losses of all samples after consecutive steps, two or more.

    Raises:
        ValueError: fewer than two steps.

    Example:
        >>> alternation(torch.tensor([[1.0, 3.0], [2.0, 2.0], [1.0, 1.0]]))
        tensor([-1.,  0.])

    Source: arXiv 2311.04163; the measure is ours.
    """
    if len(losses) < 2:
        raise ValueError(f"a change needs losses of two steps or more, got {len(losses)}")
    changes = losses.diff(dim=0).flip(0)
    signs = torch.ones(len(changes), 1, dtype=losses.dtype, device=losses.device)
    signs[1::2] = -1
    return (signs * changes).mean(0)


def random_groups(
    groups: Groups,
    labels: Int[Tensor, " n"] | None,
    count: int,
    *,
    generator: torch.Generator | None = None,
) -> Groups:
    """Random groups of the same sizes and label mixes, to compare with.

    Members of the given groups are taken only where a label has no other samples left, and a sample
    is in both only where these have more of a label than there are.

    Args:
        groups: the groups to imitate.
        labels: labels of all samples; without, any sample will do.
        count: number of all samples.
        generator: the source of randomness, on the CPU.

    Example:
        >>> groups = Groups(torch.tensor([0]), torch.tensor([1]))
        >>> labels = torch.tensor([5, 7, 5, 7])
        >>> random_groups(groups, labels, 4).members.tolist()
        [2, 3]
    """
    kinds = torch.zeros(count, dtype=torch.long) if labels is None else labels.cpu()
    order = torch.randperm(count, generator=generator)
    inside = torch.zeros(count, dtype=torch.bool)
    inside[groups.members.cpu()] = True
    # A stable sort brings members to the end of their label's queue.
    order = order[inside[order].to(torch.uint8).sort(stable=True).indices]
    queues: dict[int, list[int]] = {}
    for index in reversed(order.tolist()):
        queues.setdefault(int(kinds[index]), []).append(index)
    every = {kind: list(queue) for kind, queue in queues.items()}
    drawn: list[list[int]] = []
    for group in (groups.plus, groups.minus):
        own: list[int] = []
        for kind in kinds[group.cpu()].tolist():
            if not queues[kind]:
                queues[kind] = [index for index in every[kind] if index not in own]
            own.append(queues[kind].pop())
        drawn.append(own)
    return Groups(torch.tensor(drawn[0]), torch.tensor(drawn[1]))


def shuffled(groups: Groups, generator: torch.Generator | None = None) -> Groups:
    """The members of both groups, dealt anew: two groups with one mix of labels.

    Example:
        >>> groups = shuffled(Groups(torch.tensor([3, 5]), torch.tensor([1, 8])))
        >>> sorted(groups.members.tolist())
        [1, 3, 5, 8]
    """
    members = groups.members.cpu()
    members = members[torch.randperm(len(members), generator=generator)]
    return Groups(members[: len(groups.plus)], members[len(groups.plus) :])


def matched_groups(groups: Groups, losses: Float[Tensor, " n"]) -> Groups:
    """Other samples whose losses are closest to those of the members, one for each.

    Samples that change much are samples with large losses or gradients; this is the control for it.

    Args:
        groups: the groups to imitate.
        losses: the losses of all samples.

    Raises:
        ValueError: fewer samples outside of the groups than inside.

    Example:
        >>> groups = Groups(torch.tensor([0]), torch.tensor([1]))
        >>> matched_groups(groups, torch.tensor([1.0, 5.0, 6.0, 1.5])).members.tolist()
        [3, 2]
    """
    members = groups.members
    if 2 * len(members) > len(losses):
        raise ValueError(
            f"{len(members)} samples need as many others beside them, got {len(losses)} in all"
        )
    free = losses.detach().clone()
    free[members] = torch.inf
    found = []
    for loss in losses[members].tolist():
        found.append(int((free - loss).abs().argmin()))
        free[found[-1]] = torch.inf
    half = len(groups.plus)
    return Groups(torch.tensor(found[:half]), torch.tensor(found[half:]))


def label_counts(group: Int[Tensor, " k"], labels: Int[Tensor, " n"] | None) -> dict[int, int]:
    """How many samples of a group have which label, the most frequent first; empty without labels.

    Example:
        >>> label_counts(torch.tensor([0, 2, 3]), torch.tensor([4, 4, 9, 9]))
        {9: 2, 4: 1}
    """
    if labels is None:
        return {}
    found = labels.to(group.device)[group].tolist()
    return dict(sorted(Counter(found).items(), key=lambda pair: (-pair[1], pair[0])))
