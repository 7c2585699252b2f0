"""What attention computed in one pass, kept for another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive, unknown
from rectiflow.images.attention_taps import KINDS, attentions, network_of, second_half, tapped

if TYPE_CHECKING:
    from jaxtyping import Bool

MODES = ("off", "record", "replay")
PLACES = ("device", "cpu")


class FeatureBank:
    """Attention values of one pass of a transformer, to be put into another pass.

    While attached it either records what the chosen attentions compute or replaces it by what
    was recorded, before the attention itself; queries, keys and the rest of the network stay
    those of the second pass. Slots are named by number of step and of evaluation within the
    step, never by a time, so that the passes may take different grids of equal length. Several
    rows of the second pass share one recorded row where their number is a multiple.

    Memory is evaluations a step x steps x attentions x batch x tokens x width x bytes of a
    number: for FLUX at 1024x1024 in bfloat16, 4608 tokens of 3072 numbers and 19 blocks, 1.1 GB
    for each injected step of two evaluations. Where that is too much, `where="cpu"`.

    Args:
        model: a `FlowModel` of an MMDiT or of a Stable Diffusion 3 or FLUX pipeline, or the
            network itself.
        select: regular expression searched in the names of attentions, such as
            `r"single_transformer_blocks\\.(2\\d|3\\d)"`; the later half of the blocks by default.
        what: query, key, value, or several of them.
        where: "device" keeps them beside the network, "cpu" in main memory.
        dtype: how they are kept; as computed by default.
        budget: bytes that may be kept; None for any number.

    Attributes:
        names: the chosen attentions.
        mode: off, record or replay.
        step: number of the step, from the noisy end.
        stage: number of the evaluation within the step.
        rows: which rows of the batch take part; None for all.

    Raises:
        ValueError: a network without known attention, a pattern that selects nothing, an unknown
            name, or more bytes than the budget.

    Example:
        >>> from rectiflow.nets import MMDiT
        >>> net = MMDiT(shape=(1, 4, 4), depth=2, head_dim=4, classes=3)
        >>> bank, x = FeatureBank(net), torch.zeros(1, 1, 4, 4)
        >>> with bank.attached():
        ...     bank.mode = "record"
        ...     _ = net(x, torch.zeros(1))
        >>> bank.names, len(bank), bank.bytes
        (('blocks.1',), 2, 160)

    Source: arXiv 2411.04746, section 3.3 (RF-Edit), whose code keys values by the digits of times.
    """

    def __init__(
        self,
        model: Any,
        *,
        select: str | None = None,
        what: str | Sequence[str] = "value",
        where: str = "device",
        dtype: torch.dtype | None = None,
        budget: int | None = None,
    ) -> None:
        self.net = network_of(model)
        self.what = (what,) if isinstance(what, str) else tuple(what)
        for kind in self.what:
            if kind not in KINDS:
                raise unknown("attention feature", kind, KINDS)
        if where not in PLACES:
            raise unknown("place", where, PLACES)
        if budget is not None:
            positive("budget", budget)
        self.names = tuple(_selected(self.net, select))
        self.where, self.dtype, self.budget = where, dtype, budget
        self._mode = "off"
        self.step = self.stage = self.bytes = 0
        self.rows: Bool[Tensor, " b"] | None = None
        self._kept: dict[tuple[int, int, str], Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        self._mode = mode

    @contextmanager
    def attached(self) -> Iterator[FeatureBank]:
        """Listen to the network for the block; nothing is left in it afterwards, come what may."""
        with tapped(self.net, self.names, self.what, self._tap):
            try:
                yield self
            finally:
                self._mode, self.rows = "off", None

    def clear(self) -> None:
        """Forget what was recorded."""
        self._kept.clear()
        self.bytes = 0

    def _tap(self, name: str, x: Tensor) -> Tensor:
        taking = len(x) if self.rows is None else int(self.rows.sum())
        if self._mode == "off" or not taking:
            return x
        slot = (self.step, self.stage, name)
        if self._mode == "record":
            self._keep(slot, x if taking == len(x) else x[self.rows])
            return x
        if slot not in self._kept:
            raise ValueError(
                f"nothing was recorded for step {self.step}, evaluation {self.stage} of {name}: "
                "both passes need the same solver and the same number of steps"
            )
        return self._replaced(self._kept[slot], x, taking, name)

    def _keep(self, slot: tuple[int, int, str], x: Tensor) -> None:
        x = x.detach().to(self.dtype or x.dtype)
        if self.where == "cpu" and x.device.type != "cpu":
            x = x.cpu().pin_memory() if x.is_cuda else x.cpu()
        else:
            # Values are views of larger tensors, which they would keep alive.
            x = x.clone()
        old = self._kept.get(slot)
        self.bytes += x.nbytes - (0 if old is None else old.nbytes)
        if self.budget is not None and self.bytes > self.budget:
            raise ValueError(
                f"the feature bank needs more than its budget of {self.budget:,} bytes at step "
                f"{slot[0]}: inject fewer steps, select fewer blocks or raise the budget"
            )
        self._kept[slot] = x

    def _replaced(self, kept: Tensor, x: Tensor, count: int, name: str) -> Tensor:
        if kept.shape[1:] != x.shape[1:] or count % len(kept):
            raise ValueError(
                f"{name} recorded features of shape {tuple(kept.shape)}, which do not fit "
                f"{(count, *x.shape[1:])}: both passes need images and conditions of the same "
                "number of tokens, and a whole number of targets for each source"
            )
        kept = kept.to(x.device, x.dtype, non_blocking=True)
        kept = kept.repeat_interleave(count // len(kept), 0)
        if count == len(x):
            return kept
        mixed = x.clone()
        mixed[self.rows] = kept
        return mixed


def _selected(net: Any, select: str | None) -> list[str]:
    """The names that a pattern selects."""
    if select is None:
        return second_half(net)
    every = attentions(net)
    try:
        found = [name for name in every if re.search(select, name)]
    except re.error as error:
        raise ValueError(f"the pattern {select!r} is no regular expression: {error}") from None
    if not found:
        raise ValueError(
            f"the pattern {select!r} selects no attention: names run from {every[0]} to {every[-1]}"
        )
    return found
