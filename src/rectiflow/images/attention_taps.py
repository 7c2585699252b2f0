"""Read and replace queries, keys and values of attention, in our networks and in diffusers'."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from rectiflow.nets.joint_blocks import JointBlock

Tap = Callable[[str, Tensor], Tensor]
KINDS = ("query", "key", "value")
# The layers of an attention of diffusers that make each kind, for the image and for the text.
LAYERS = {
    "query": ("to_q", "add_q_proj"),
    "key": ("to_k", "add_k_proj"),
    "value": ("to_v", "add_v_proj"),
}
# The blocks of diffusers' transformers whose second half is edited by default. FLUX has two
# kinds; in its single-stream blocks text and image share their weights.
CHOSEN = {
    "SD3Transformer2DModel": "transformer_blocks",
    "FluxTransformer2DModel": "single_transformer_blocks",
}


def network_of(model: Any) -> nn.Module:
    """The network inside a model: that of a `FlowModel`, the diffusers module of a pipeline."""
    net = getattr(model, "net", model)
    inner = getattr(net, "module", None)
    return inner if _kind(inner) is not None else net


def attentions(net: nn.Module) -> list[str]:
    """The names of all attentions that can be tapped, in the order of the network.

    Raises:
        ValueError: a network without any that is known, or with fused projections.
    """
    if _kind(net) is not None:
        found: dict[str, Any] = net.attn_processors
        names = [name.removesuffix(".processor") for name in found]
        fused = [n for n in names if getattr(net.get_submodule(n), "fused_projections", False)]
        if fused:
            raise ValueError(
                f"the projections of {fused[0]} are fused, so its values cannot be told apart: "
                "call unfuse_qkv_projections() on the transformer"
            )
        return names
    names = [name for name, module in net.named_modules() if isinstance(module, JointBlock)]
    if not names:
        raise ValueError(
            f"{type(net).__name__} has no attention whose values can be kept: accepted are our "
            "mmdit and diffusers' Stable Diffusion 3 and FLUX transformers"
        )
    return names


def second_half(net: nn.Module) -> list[str]:
    """The attentions of the later half of the blocks (of FLUX: of its single-stream blocks)."""
    prefix = CHOSEN.get(_kind(net) or "")
    names = [n for n in attentions(net) if prefix is None or n.startswith(f"{prefix}.")]
    blocks = sorted({_number(name) for name in names})
    later = set(blocks[len(blocks) // 2 :])
    return [name for name in names if _number(name) in later]


@contextmanager
def tapped(net: nn.Module, names: Sequence[str], kinds: Sequence[str], tap: Tap) -> Iterator[None]:
    """Pass what attentions compute through `tap` for the block; afterwards all is as it was.

    Ours are tapped by forward hooks; diffusers' by attention processors around their own, so
    that whatever processor is in use goes on to work.

    Args:
        net: the network, see `network_of`.
        names: some of `attentions(net)`.
        kinds: some of query, key, value.
        tap: given a name and a tensor of shape `(b, tokens, ...)`, returns what is used instead.
    """
    with ExitStack() as stack:
        if _kind(net) is None:
            for name in names:
                _tap_block(stack, net.get_submodule(name), name, kinds, tap)
        else:
            whole: Any = net
            before = dict(whole.attn_processors)
            # set_attn_processor empties the dictionary it is given.
            stack.callback(lambda: whole.set_attn_processor(dict(before)))
            chosen = {f"{name}.processor" for name in names}
            whole.set_attn_processor(
                {
                    key: _around(inner, key, kinds, tap) if key in chosen else inner
                    for key, inner in before.items()
                }
            )
        yield


def _tap_block(
    stack: ExitStack, block: nn.Module, name: str, kinds: Sequence[str], tap: Tap
) -> None:
    assert isinstance(block, JointBlock)
    parts = {"context": block.context.attention, "image": block.image.attention}
    if block.image.dual is not None:
        parts["dual"] = block.image.dual
    for part, module in parts.items():

        def hook(_: nn.Module, given: Any, made: Any, part: str = part) -> tuple[Any, ...]:
            return tuple(
                tap(f"{name}.{part}.{kind}", one) if kind in kinds and one is not None else one
                for kind, one in zip(KINDS, made)
            )

        stack.callback(module.register_forward_hook(hook).remove)


def _around(inner: Any, key: str, kinds: Sequence[str], tap: Tap) -> Any:
    """An attention processor that listens to the projections while `inner` does its work."""
    name = key.removesuffix(".processor")

    # diffusers reads the signature to decide what it may pass on.
    @functools.wraps(type(inner).__call__)
    def call(_: Any, attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for kind in kinds:
                for layer in LAYERS[kind]:
                    module = getattr(attention, layer, None)
                    if module is None:
                        continue

                    def hook(_: nn.Module, given: Any, made: Tensor, at: str = layer) -> Tensor:
                        return tap(f"{name}.{at}", made)

                    stack.callback(module.register_forward_hook(hook).remove)
            return inner(attention, *args, **kwargs)

    return type("TappedProcessor", (), {"__call__": call})()


def _kind(net: Any) -> str | None:
    """The class of diffusers' that a network is, where it is one of those known."""
    return next((kind.__name__ for kind in type(net).__mro__ if kind.__name__ in CHOSEN), None)


def _number(name: str) -> int:
    """The number of the block in a name."""
    return next(int(part) for part in name.split(".") if part.isdigit())
