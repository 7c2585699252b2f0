"""How well pictures show something in every view, and nothing of it in the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float


@torch.no_grad()
def score_matrix(
    score: Callable[..., Tensor],
    pictures: Sequence[Float[Tensor, "b *dims"]],
    conditions: Sequence[Mapping[str, Any]],
) -> Float[Tensor, "b views conditions"]:
    """The score of every view of pictures for the condition of every view.

    Args:
        score: pictures, with a condition by name, to one number a sample.
        pictures: the views of the pictures.
        conditions: what each view should show, with a row a sample.

    Example:
        >>> views = [torch.tensor([[0.9, 0.2]]), torch.tensor([[0.1, 0.6]])]
        >>> wanted = [{"label": 0}, {"label": 1}]
        >>> score_matrix(lambda x, label: x[:, label], views, wanted)
        tensor([[[0.9000, 0.2000],
                 [0.1000, 0.6000]]])
    """
    rows = [torch.stack([score(one, **given) for given in conditions], 1) for one in pictures]
    return torch.stack(rows, 1)


def alignment(scores: Float[Tensor, "b views views"]) -> Float[Tensor, " b"]:
    """The score of the view that shows its condition least.

    Example:
        >>> alignment(torch.tensor([[[0.9, 0.2], [0.1, 0.6]]]))
        tensor([0.6000])

    Source: arXiv 2311.17919, section 4 (alignment score A).
    """
    return scores.diagonal(dim1=1, dim2=2).amin(1)


def concealment(
    scores: Float[Tensor, "b views views"], *, temperature: float = 0.01
) -> Float[Tensor, " b"]:
    """How surely views and conditions can be matched: 1 if no view shows what another should.

    The mean of `tr softmax(S / temperature) / views` with the softmax over conditions and over
    views.

    Args:
        scores: of views by conditions, such as cosines of CLIP.
        temperature: of the softmax; CLIP's own is 0.01.

    Example:
        >>> round(concealment(torch.tensor([[[0.9, 0.2], [0.1, 0.6]]])).item(), 4)
        1.0

    Source: arXiv 2311.17919, section 4 (concealment score C).
    """
    positive("temperature", temperature)
    sharp = scores / temperature
    both = (sharp.softmax(1) + sharp.softmax(2)) / 2
    return both.diagonal(dim1=1, dim2=2).mean(1)
