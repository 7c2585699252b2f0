"""Weights of Stable Diffusion 3 and 3.5 in our `MMDiT` and back: diffusers' and original layout.

Two things change besides names. The released networks predict noise minus data and ours data
minus noise, so the sign of the last layer flips; and their time is 1000 times the noise level,
which our network makes of our t by itself. All of it is exact: there and back is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import require, unknown
from rectiflow.nets.mmdit import MMDiT

if TYPE_CHECKING:
    State = Mapping[str, Tensor]

LAYOUTS = ("diffusers", "stability")
# What single-file checkpoints put before the names of the network.
PREFIX = "model.diffusion_model."
WEIGHTS = ("weight", "bias")


@dataclass(frozen=True)
class Rule:
    """Where one tensor of ours lives in the other layouts, and what changes on the way.

    Attributes:
        ours: its name here.
        stability: its name in the original layout.
        diffusers: its name in diffusers; three names where one tensor of ours is three there.
        change: keep, patches, positions, negate, or swap (halves, in diffusers only).
    """

    ours: str
    stability: str
    diffusers: tuple[str, ...]
    change: str = "keep"


def from_checkpoint(
    source: str | Path | State, *, head_dim: int | None = None, side: int | None = None
) -> MMDiT:
    """Our network with the weights of a Stable Diffusion 3 or 3.5 checkpoint.

    Layout, depth, widths, QK norms and dual-attention blocks are read off the names and shapes
    of the weights. Give the result to `FlowModel(net, shape=net.shape)`: path and prediction are
    the defaults.

    Args:
        source: a safetensors file or a state dict, in diffusers' or the original layout; other
            parts of a single-file checkpoint are ignored.
        head_dim: width of a head, where no QK norm tells it; 64 by default.
        side: height and width of the latents the model is meant for; 128 (1024 pixels) by
            default, or the size of the table of positions where that is smaller.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights of something else, or missing or extra ones (named).

    Source: arXiv 2403.03206; names as in the released checkpoints.
    """
    state = _read(source)
    layout = _layout(state)
    config = detect(state, head_dim=head_dim, side=side)
    with torch.device("meta"):
        net = MMDiT(**config)
    net.load_state_dict(_to_ours(state, layout, config), assign=True)
    return net


def from_diffusers(transformer: Any) -> MMDiT:
    """Our network with the weights and settings of a diffusers `SD3Transformer2DModel`.

    The weights are copied. `net(x, t, context=c, pooled=p)` is minus
    `transformer(x, c, p, 1000 (1 - t))`.

    Raises:
        ValueError: settings that the network of the paper does not have.
    """
    given = dict(transformer.config)
    width = given["num_attention_heads"] * given["attention_head_dim"]
    for key, wanted in (("caption_projection_dim", width), ("out_channels", given["in_channels"])):
        if given[key] not in (wanted, None):
            raise ValueError(f"the transformer's {key} must be {wanted}, got {given[key]}")
    return from_checkpoint(
        transformer.state_dict(), head_dim=given["attention_head_dim"], side=given["sample_size"]
    )


def to_state(net: MMDiT, layout: str) -> dict[str, Tensor]:
    """The weights of our network under the names and in the forms of another layout.

    Args:
        net: a network with context and pooled vector and without class labels.
        layout: diffusers or stability.

    Raises:
        ValueError: an unknown layout, or conditions that the other layouts do not have.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    config = net.config
    if config["classes"] or not config["context_dim"] or not config["pooled_dim"]:
        raise ValueError(
            "the network of Stable Diffusion 3 takes context and pooled vectors and no labels: "
            f"got context_dim={config['context_dim']}, pooled_dim={config['pooled_dim']}, "
            f"classes={config['classes']}"
        )
    own, found = net.state_dict(), dict[str, Tensor]()
    for rule in rules(config):
        value = own[rule.ours]
        names = rule.diffusers if layout == "diffusers" else (rule.stability,)
        value = _changed(value, rule.change, layout, config, back=True)
        found |= {name: part.clone() for name, part in zip(names, value.chunk(len(names)))}
    return found


def to_diffusers(net: MMDiT) -> Any:
    """A diffusers `SD3Transformer2DModel` with the weights of our network.

    Raises:
        MissingExtraError: diffusers is not installed.
        ValueError: conditions that it does not have, an oblong training shape.
    """
    require("diffusers", "diffusers")
    from diffusers import SD3Transformer2DModel

    state, config = to_state(net, "diffusers"), net.config
    channels, height, width = config["shape"]
    if height != width:
        raise ValueError(f"diffusers' transformer has a square shape, got {height}x{width}")
    heads = config["heads"] or config["depth"]
    made = SD3Transformer2DModel(
        sample_size=height,
        patch_size=config["patch"],
        in_channels=channels,
        out_channels=channels,
        num_layers=config["depth"],
        attention_head_dim=config["head_dim"],
        num_attention_heads=heads,
        joint_attention_dim=config["context_dim"],
        caption_projection_dim=heads * config["head_dim"],
        pooled_projection_dim=config["pooled_dim"],
        pos_embed_max_size=net.max_size,
        dual_attention_layers=tuple(config["dual_layers"]),
        qk_norm="rms_norm" if config["qk_norm"] else None,
    )
    made.load_state_dict(state)
    return made.to(net.head.weight.dtype).train(net.training)


def detect(state: State, *, head_dim: int | None = None, side: int | None = None) -> dict[str, Any]:
    """The arguments of `MMDiT` that fit a state dict of either layout.

    Args:
        state: the weights.
        head_dim: width of a head, where no QK norm tells it; 64 by default.
        side: height and width of the latents.
    """
    layout = _layout(state)
    stability = layout == "stability"
    block = "joint_blocks" if stability else "transformer_blocks"
    patches = state["x_embedder.proj.weight" if stability else "pos_embed.proj.weight"]
    table = state["pos_embed" if stability else "pos_embed.pos_embed"]
    pooled = "y_embedder.mlp.0" if stability else "time_text_embed.text_embedder.linear_1"
    key_norm = f"{block}.0.x_block.attn.ln_k" if stability else f"{block}.0.attn.norm_k"
    query = ".attn2.qkv.weight" if stability else ".attn2.to_q.weight"
    numbers = {int(name.split(".")[1]) for name in state if name.startswith(f"{block}.")}
    width, channels, patch = patches.shape[0], patches.shape[1], patches.shape[2]
    norm = state.get(f"{key_norm}.weight")
    if norm is not None:
        head_dim = norm.shape[0]
    head_dim = 64 if head_dim is None else head_dim
    if width % head_dim:
        raise ValueError(
            f"a width of {width} is no multiple of head_dim {head_dim}: pass the right head_dim"
        )
    size = round(table.shape[1] ** 0.5)
    side = min(128, size * patch) if side is None else side
    return {
        "shape": (channels, side, side),
        "depth": max(numbers) + 1,
        "heads": width // head_dim,
        "head_dim": head_dim,
        "patch": patch,
        "context_dim": state["context_embedder.weight"].shape[1],
        "pooled_dim": state[f"{pooled}.weight"].shape[1],
        "qk_norm": "rms" if norm is not None else None,
        "dual_layers": tuple(
            sorted(int(name.split(".")[1]) for name in state if name.endswith(query))
        ),
        "max_size": size,
        "position_scale": side / patch / size,
    }


def rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    """Every tensor of a network with this config."""
    yield Rule("positions", "pos_embed", ("pos_embed.pos_embed",), "positions")
    yield from _layer("patches", "x_embedder.proj", "pos_embed.proj", change="patches")
    for ours, stability, other in (
        ("time", "t_embedder", "timestep_embedder"),
        ("pooled", "y_embedder", "text_embedder"),
    ):
        for index, number in ((0, 1), (2, 2)):
            there = f"time_text_embed.{other}.linear_{number}"
            yield from _layer(f"{ours}.{index}", f"{stability}.mlp.{index}", there)
    yield from _layer("context_in", "context_embedder", "context_embedder")
    for index in range(config["depth"]):
        yield from _block_rules(config, index)
    yield from _layer(
        "modulation",
        "final_layer.adaLN_modulation.1",
        "norm_out.linear",
        change="swap",
        also="swap",
    )
    yield from _layer("head", "final_layer.linear", "proj_out", change="negate", also="negate")


def _layer(
    ours: str, stability: str, *diffusers: str, change: str = "keep", also: str = "keep"
) -> Iterator[Rule]:
    """Weight and bias of a linear layer, the bias with a change of its own."""
    for kind, changed in zip(WEIGHTS, (change, also)):
        names = tuple(f"{name}.{kind}" for name in diffusers)
        yield Rule(f"{ours}.{kind}", f"{stability}.{kind}", names, changed)


def _block_rules(config: Mapping[str, Any], index: int) -> Iterator[Rule]:
    last = index == config["depth"] - 1
    root = f"transformer_blocks.{index}"
    for stream, original, suffix, feed in (
        ("context", "context_block", "_context", "ff_context"),
        ("image", "x_block", "", "ff"),
    ):
        ours, there = f"blocks.{index}.{stream}", f"joint_blocks.{index}.{original}"
        silent, added = last and stream == "context", stream == "context"
        change = "swap" if silent else "keep"
        yield from _layer(
            f"{ours}.modulation",
            f"{there}.adaLN_modulation.1",
            f"{root}.norm1{suffix}.linear",
            change=change,
            also=change,
        )
        attentions = [("attention", "attn")]
        if stream == "image" and index in config["dual_layers"]:
            attentions.append(("dual", "attn2"))
        for own, name in attentions:
            parts = ("add_{}_proj" if added else "to_{}", "norm_added_{}" if added else "norm_{}")
            names = [f"{root}.{name}.{parts[0].format(part)}" for part in "qkv"]
            yield from _layer(f"{ours}.{own}.qkv", f"{there}.{name}.qkv", *names)
            for part, norm in (("q", "query_norm"), ("k", "key_norm")):
                if config["qk_norm"]:
                    other = f"{root}.{name}.{parts[1].format(part)}.weight"
                    original_name = f"{there}.{name}.ln_{part}.weight"
                    yield Rule(f"{ours}.{own}.{norm}", original_name, (other,))
            if not silent:
                out = "to_add_out" if added else "to_out.0"
                yield from _layer(
                    f"{ours}.{own}.out", f"{there}.{name}.proj", f"{root}.{name}.{out}"
                )
        if not silent:
            yield from _layer(f"{ours}.up", f"{there}.mlp.fc1", f"{root}.{feed}.net.0.proj")
            yield from _layer(f"{ours}.down", f"{there}.mlp.fc2", f"{root}.{feed}.net.2")


def _to_ours(state: State, layout: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    found, used = dict[str, Tensor](), set[str]()
    for rule in rules(config):
        names = rule.diffusers if layout == "diffusers" else (rule.stability,)
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"the weights lack {missing[0]!r}: the checkpoint is incomplete")
        # A copy even of one tensor: training must not write into somebody else's network.
        value = torch.cat([state[name] for name in names])
        found[rule.ours] = _changed(value, rule.change, layout, config, back=False)
        used.update(names)
    extra = sorted(set(state) - used)
    if extra:
        raise ValueError(f"the weights hold {extra[0]!r}, which this network does not have")
    return found


def _changed(
    value: Tensor, change: str, layout: str, config: Mapping[str, Any], *, back: bool
) -> Tensor:
    """The tensor in the other form; `back` is from ours to theirs."""
    if change == "negate":
        return -value
    if change == "swap":
        # Theirs is (scale, shift) in diffusers alone.
        return torch.cat(value.chunk(2)[::-1]) if layout == "diffusers" else value
    if change == "patches":
        side = config["patch"]
        return value.unflatten(1, (-1, side, side)) if back else value.flatten(1)
    if change == "positions":
        return _grid(value) if back else _axis(value)
    return value


def _grid(axis: Tensor) -> Tensor:
    """The whole table of positions: columns in the first half of the features, then rows."""
    size = axis.shape[0]
    both = (axis[None].expand(size, -1, -1), axis[:, None].expand(-1, size, -1))
    return torch.cat(both, 2).flatten(0, 1)[None]


def _axis(table: Tensor) -> Tensor:
    """One axis of a table of positions, of which the table must consist."""
    size = round(table.shape[1] ** 0.5)
    axis = table[0, :size, : table.shape[2] // 2].clone()
    if table.shape[1] != size**2 or not torch.equal(_grid(axis), table):
        raise ValueError(
            "the table of positions is not made of one table for rows and columns, as that of "
            "Stable Diffusion 3 is: it cannot be converted"
        )
    return axis


def _read(source: str | Path | State) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        state = dict(source)
    else:
        from safetensors.torch import load_file

        if not Path(source).is_file():
            raise FileNotFoundError(f"no checkpoint at {source} (a safetensors file)")
        state = load_file(source)
    inside = {name.removeprefix(PREFIX): v for name, v in state.items() if name.startswith(PREFIX)}
    return inside or state


def _layout(state: State) -> str:
    if "x_embedder.proj.weight" in state and "joint_blocks.0.x_block.attn.qkv.weight" in state:
        return "stability"
    if "pos_embed.proj.weight" in state and "transformer_blocks.0.attn.add_q_proj.weight" in state:
        return "diffusers"
    first = ", ".join(sorted(state)[:3])
    raise ValueError(
        "these are not the weights of a Stable Diffusion 3 transformer in diffusers' or the "
        f"original layout: the first names are {first or 'none'}"
    )
