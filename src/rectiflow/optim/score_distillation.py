"""A loss for gradients that come from no loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def score_distillation_loss(
    latents: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """A number whose gradient with respect to the latents is exactly the one given.

    Score distillation knows `G = w(t) (eps_hat - eps)`, or a flow's velocity residual, and no loss
    behind it. The number is `||G||² / 2`, summed: dividing it by the latents' size would divide G.
    Any factor on it, such as a gradient scaler's, multiplies the gradient.

    Args:
        latents: what the gradient belongs to, with a graph.
        gradient: G; NaN and infinity in it count as zero.

    Returns:
        the loss.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> import torch
        >>> z = torch.ones(3, requires_grad=True)
        >>> score_distillation_loss(z, torch.tensor([1.0, 2.0, float("nan")])).backward()
        >>> z.grad
        tensor([1., 2., 0.])

    Source: the surrogate of arXiv 2310.12474, `(z - stop(z - G))² / 2`, without its rounding of G.
    """
    if latents.shape != gradient.shape:
        raise ValueError(
            f"a gradient has the shape of its latents, {tuple(latents.shape)}, got "
            f"{tuple(gradient.shape)}"
        )
    given = gradient.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(latents.dtype)
    # The difference is zero; only its gradient counts.
    return (0.5 * given.square() + (latents - latents.detach()) * given).sum()
