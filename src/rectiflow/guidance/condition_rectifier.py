"""A small graph network that says how the end of a sentence should be shifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rectiflow.errors import positive
from rectiflow.guidance.graph_attention import RelationalGraphAttention
from rectiflow.guidance.relation_graph import ENDS, ROLES, GraphBuilder, directed_relation
from rectiflow.guidance.relation_prompts import RelationPrompts, RelationShifts
from rectiflow.vectors import clip_norm, norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class ConditionRectifier(nn.Module):
    """Words and ends of sentences in, a shift of each sentence's end out.

    Text encoders of the contrastive kind give "A contains B" and "B contains A" nearly the same
    end-of-text vector, from which a picture's relation is read. This module sees the order that
    the vector has lost, as a graph, and says what to add. It is trained by
    `PairContrastiveDenoising` and applied by `RelationRectifier`; model and text encoder stay.

    Args:
        net: maps nodes `(*b, n, width)` and their graph to vectors of the same shape.
        graph: makes the graph of the roles of nodes; `symmetric_relation` ignores the order.
        cap: longest shift, as a part of the length of the vector that is shifted; None for none.
        about: plain facts that are saved with it, such as the words it was trained on.

    Raises:
        ValueError: a cap that is not positive.

    Example:
        >>> rectifier = ConditionRectifier(RelationalGraphAttention(16, hidden=8))
        >>> rectifier(torch.randn(3, 5, 16)).shape
        torch.Size([3, 2, 16])

    Source: arXiv 2403.20249, section 4; the cap is ours.
    """

    def __init__(
        self,
        net: RelationalGraphAttention,
        graph: GraphBuilder = directed_relation,
        *,
        cap: float | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if cap is not None:
            positive("cap", cap)
        self.net, self.graph, self.cap = net, graph, cap
        self.about = dict(about or {})

    def forward(
        self, nodes: Float[Tensor, "*b n width"], roles: Sequence[str] = ROLES
    ) -> Float[Tensor, "*b 2 width"]:
        """The shifts of the end of the sentence about the first object, and of the whole sentence.

        Args:
            nodes: vectors of the words and ends of one or more relations.
            roles: what each node is; nodes may be stored in any order.
        """
        if nodes.shape[-1] != self.net.width:
            raise ValueError(
                f"nodes must have the {self.net.width} numbers that this rectifier was made for, "
                f"got {nodes.shape[-1]}: it belongs to another text encoder"
            )
        places = [tuple(roles).index(role) for role in ENDS]
        deltas = self.net(nodes, self.graph(tuple(roles)))[..., places, :]
        if self.cap is None:
            return deltas
        start = deltas.ndim - 1
        longest = self.cap * norm(nodes[..., places, :], start=start)
        return clip_norm(deltas, longest, start=start)

    def deltas(self, nodes: Float[Tensor, "*b 2 n width"]) -> Float[Tensor, "*b 4 width"]:
        """The shifts of `PROMPTS`, from the nodes of the graphs of A R B and of B R A.

        The graph of A R B has A for its first object and so says the shift of the sentence about A
        alone; that of B R A says the one about B.
        """
        found = self(nodes)
        return torch.cat([found[..., 1, :], found[..., 0, :]], -2)

    def shifts(self, prompts: RelationPrompts) -> RelationShifts:
        """What is added to the ends of four prompts; words it was not trained on are welcome."""
        weight = next(self.parameters())
        return RelationShifts(self.deltas(prompts.nodes().to(weight)), prompts.ends, prompts.key)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `rectifier.safetensors` and `config.json`.

        Raises:
            FileExistsError: the folder exists and `overwrite` is not set.
            ValueError: a graph that is not one of `GRAPHS`, which a file cannot name.
        """
        from rectiflow.guidance.rectifier_folder import save

        return save(self, folder, overwrite=overwrite)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ConditionRectifier:
        """Read a folder of `save_pretrained`.

        Raises:
            FileNotFoundError: no such folder.
            ModelFolderError: a file in it is missing, damaged or of another kind.
        """
        from rectiflow.guidance.rectifier_folder import load

        return load(folder)
