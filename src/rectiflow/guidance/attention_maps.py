"""To which words of its text a network attends, and where."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rectiflow.nets.joint_blocks import JointBlock

if TYPE_CHECKING:
    from jaxtyping import Float


@contextmanager
def text_attention(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, for the block, how much each place of the image attends to each token of the text.

    A map is the softmax of queries of the image with the keys of the text, `(b, places, tokens)`,
    summed over heads; where the image attends to itself in the same softmax (our `mmdit`, Stable
    Diffusion 3, DeepFloyd IF) its rows sum to less than the number of heads. Queries and keys are
    read from the layers that make them, so whatever attention processor is in use goes on to
    work, and maps carry gradients.

    Args:
        net: a network of ours with context tokens, a U-Net of diffusers or its Stable Diffusion 3
            transformer; parts of it may be wrapped.

    Returns:
        a list that grows by one map a layer with every call of the network.

    Raises:
        ValueError: a network without attention to text that can be read.

    Example:
        >>> from rectiflow.nets import MMDiT
        >>> net = MMDiT(shape=(1, 4, 4), depth=2, head_dim=4, context_dim=6)
        >>> with text_attention(net) as maps:
        ...     _ = net(torch.zeros(3, 1, 4, 4), torch.zeros(3), context=torch.zeros(3, 5, 6))
        >>> [tuple(one.shape) for one in maps]
        [(3, 4, 5), (3, 4, 5)]
    """
    maps: list[Tensor] = []
    with ExitStack() as stack:
        found = False
        for module in net.modules():
            if isinstance(module, JointBlock):
                _listen_to_block(stack, module, maps)
            elif _of_text(module):
                _listen_to_attention(stack, module, maps)
            else:
                continue
            found = True
        if not found:
            name = type(getattr(net, "net", net)).__name__
            raise ValueError(
                f"{name} has no attention to text that can be read: accepted are our mmdit, and "
                "U-Nets and Stable Diffusion 3 transformers of diffusers"
            )
        yield maps


def weights_of(
    query: Float[Tensor, "b heads n d"],
    text: Float[Tensor, "b heads l d"],
    image: Float[Tensor, "b heads m d"] | None,
    scale: float,
) -> Float[Tensor, "b n l"]:
    """The weights of the text's keys in a softmax over those of the text and of the image."""
    keys = text if image is None else torch.cat([text, image], 2)
    weights = (scale * query @ keys.transpose(2, 3)).softmax(3)
    return weights[..., : text.shape[2]].sum(1)


def _listen_to_block(stack: ExitStack, block: JointBlock, maps: list[Tensor]) -> None:
    """Ours: the stream of the text speaks first."""
    kept: dict[str, Tensor] = {}

    def context(_: nn.Module, given: Any, made: Any) -> None:
        kept["text"] = made[1].transpose(1, 2)

    def image(_: nn.Module, given: Any, made: Any) -> None:
        query, key = (one.transpose(1, 2) for one in made[:2])
        maps.append(weights_of(query, kept.pop("text"), key, query.shape[-1] ** -0.5))

    stack.callback(block.context.attention.register_forward_hook(context).remove)
    stack.callback(block.image.attention.register_forward_hook(image).remove)


def _of_text(module: Any) -> bool:
    """Whether a module is an attention of diffusers that reads text."""
    if not any(kind.__name__ == "Attention" for kind in type(module).__mro__):
        return False
    added = getattr(module, "added_kv_proj_dim", None) is not None
    return added or bool(getattr(module, "is_cross_attention", False))


def _listen_to_attention(stack: ExitStack, attention: Any, maps: list[Tensor]) -> None:
    """Diffusers': keys of the text have a layer of their own, or are the only ones."""
    added = attention.added_kv_proj_dim is not None
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, given: Any, made: Tensor, *, name: str) -> None:
        kept[name] = made

    def heads(name: str, norm: str) -> Tensor | None:
        if name not in kept:
            return None
        split = kept[name].unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        normalize = getattr(attention, norm, None)
        return split if normalize is None else normalize(split)

    def done(_: nn.Module, given: Any, made: Any) -> None:
        query = heads("to_q", "norm_q")
        text = heads("add_k_proj", "norm_added_k") if added else heads("to_k", "norm_k")
        image = heads("to_k", "norm_k") if added else None
        kept.clear()
        if query is None or text is None:
            raise ValueError(
                "the projections of an attention are fused, so its maps cannot be read: call "
                "unfuse_qkv_projections() on the network"
            )
        maps.append(weights_of(query, text, image, attention.scale))

    for name in ("to_q", "to_k", "add_k_proj"):
        layer = getattr(attention, name, None)
        if layer is not None:
            hook = functools.partial(keep, name=name)
            stack.callback(layer.register_forward_hook(hook).remove)
    stack.callback(attention.register_forward_hook(done).remove)
