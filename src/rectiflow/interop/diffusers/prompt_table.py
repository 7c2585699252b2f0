"""The embeddings of prompts as a table whose row numbers are conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True, eq=False)
class PromptTable:
    """The embeddings of prompts, one row a prompt, in chunks that may lie on disk.

    It is data for couplings: `condition` gives row numbers, so pairs store eight bytes a prompt
    and not its embedding (236 kB for Stable Diffusion 1.5, 5 MB for 3). A table is never copied.

    Attributes:
        prompts: the texts.
        chunks: condition tensors of `chunk` prompts each, the last one of fewer.
        null: the condition of the empty prompt, one row.
        digest: SHA-256 of texts and encoders.
        chunk: prompts in a chunk.
    """

    prompts: tuple[str, ...]
    chunks: tuple[dict[str, Tensor], ...]
    null: dict[str, Tensor]
    digest: str
    chunk: int

    def __len__(self) -> int:
        return len(self.prompts)

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptTable:
        return self

    def rows(self, indices: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """The condition of the given prompts; the number of prompts itself stands for none.

        Returns:
            tensors of one row a prompt, on the device of the indices.

        Raises:
            IndexError: a row outside the table.
        """
        wanted = indices.tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) <= len(self):
            raise IndexError(
                f"prompts are numbered 0 to {len(self) - 1} ({len(self)} for none), got "
                f"{min(wanted)} to {max(wanted)}"
            )
        found = {}
        for name, null in self.null.items():
            rows = [
                null[0]
                if row == len(self)
                else self.chunks[row // self.chunk][name][row % self.chunk]
                for row in wanted
            ]
            stacked = torch.stack(rows) if rows else null[:0]
            found[name] = stacked.to(indices.device)
        return found

    def batch(self, indices: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The row numbers themselves: a table holds no images."""
        return indices

    def condition(self, indices: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """What pairs store: `{"prompt": row numbers}`."""
        return {"prompt": indices}

    def everything(self) -> dict[str, Tensor]:
        """The condition of all prompts, in memory."""
        return self.rows(torch.arange(len(self)))
