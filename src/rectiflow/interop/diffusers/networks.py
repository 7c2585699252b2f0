"""The network of a pipeline as `net(x, t, **condition)`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rectiflow.errors import require, unknown
from rectiflow.interop.diffusers.families import FAMILIES
from rectiflow.interop.diffusers.prompt_table import PromptTable
from rectiflow.interop.diffusers.readings import Reading, describe, reading_of

if TYPE_CHECKING:
    from jaxtyping import Float


class PipelineNet(nn.Module):
    """A U-Net or transformer of diffusers behind our network protocol.

    `x` are scaled latents `(b, c, h, w)`, also for FLUX, whose packing happens inside; `t` runs
    from noise to data. Conditions are tensors with one row a sample: `context`, `pooled`,
    `time_ids` and `guidance` as the family takes them, or `prompt`, row numbers of the table of
    embeddings in `prompts` (the row after the last is the null condition). What is not given is
    null, or the default of the pipeline.

    Args:
        shape: shape of the latents of one sample.
        family: sd, sdxl, sd3 or flux.
        module: the network itself, or its diffusers configuration to make a new one from.
        reading: how it is called and what its output says, or the description of that.
        null: the null condition: one row a tensor, or only their shapes.
        defaults: rows of conditions used when they are not given (`time_ids`, `guidance`).
        classes: always 0: text takes the place of labels.

    Attributes:
        prompts: the table that `prompt` counts the rows of; never saved with the weights.
    """

    name: ClassVar[str] = "diffusers"

    def __init__(
        self,
        *,
        shape: Sequence[int],
        family: str,
        module: nn.Module | Mapping[str, Any],
        reading: Reading | Mapping[str, Any],
        null: Mapping[str, Tensor | Sequence[int]] | None = None,
        defaults: Mapping[str, Sequence[float] | float] | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if family not in FAMILIES:
            raise unknown("family", family, FAMILIES)
        if classes:
            raise ValueError(f"a network of a pipeline takes text, not labels, got {classes=}")
        self.shape = tuple(int(side) for side in shape)
        self.family = FAMILIES[family]
        if self.family.key == "flux" and (self.shape[1] % 2 or self.shape[2] % 2):
            raise ValueError(f"FLUX needs latents of even sides, got {self.shape}")
        self.reading = reading_of(reading) if isinstance(reading, Mapping) else reading
        if isinstance(module, nn.Module):
            self.module = module
        else:
            require("diffusers", "diffusers")
            import diffusers

            self.module = getattr(diffusers, self.family.network).from_config(dict(module))
        self.defaults = dict(defaults or {})
        self._nulls = tuple(null or ())
        for key, value in (null or {}).items():
            row = value if isinstance(value, Tensor) else torch.zeros(1, *value)
            self.register_buffer(f"null_{key}", row.detach().clone())
        self.prompts: PromptTable | None = None
        self._last: tuple[PromptTable, Tensor, dict[str, Tensor]] | None = None
        self.classes = 0
        self.config: dict[str, Any] = {
            "shape": list(self.shape),
            "family": family,
            "module": _plain(self.module),
            "reading": describe(self.reading),
            "null": {key: list(self._null(key).shape[1:]) for key in self._nulls},
            "defaults": self.defaults,
            "classes": 0,
        }

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b c h w"]:
        full = self._complete(x, condition)
        return self.reading(partial(self._raw, full), x, t)

    @property
    def conditional(self) -> bool:
        """True: all families take text."""
        return True

    def null_condition(self, **condition: Any) -> dict[str, Any]:
        """The embedding of the empty prompt in place of each one given; the rest as it is.

        Raises:
            ValueError: a condition this family does not take, or no null condition is known.
        """
        self._known(condition)
        found: dict[str, Any] = {}
        for name, value in condition.items():
            if value is None or name in ("time_ids", "guidance"):
                found[name] = value
            elif name == "prompt":
                found[name] = torch.full_like(value, len(self._table()))
            else:
                found[name] = self._null(name).to(value).expand_as(value)
        return found

    def check(self, x: Float[Tensor, "b *dims"], **condition: Any) -> None:
        """Raise ValueError unless the network can be called with `x` and this condition."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"{self.family.pipeline} was read for latents of shape {self.shape}, got "
                f"{tuple(x.shape[1:])}: give from_pipeline another size"
            )
        self._known(condition)
        for name, value in condition.items():
            if isinstance(value, Tensor) and value.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"{name} must have one row for each of the {len(x)} samples, got "
                    f"{tuple(value.shape)}"
                )
            if name in self._nulls and value.shape[1:] != self._null(name).shape[1:]:
                raise ValueError(
                    f"{name} must have rows of shape {tuple(self._null(name).shape[1:])}, got "
                    f"{tuple(value.shape[1:])}: encode the prompts with this pipeline"
                )
        rows = condition.get("prompt")
        if rows is not None and len(rows):
            most = len(self._table())
            if not 0 <= int(rows.min()) <= int(rows.max()) <= most:
                raise ValueError(
                    f"prompt must be from 0 to {most - 1} ({most} for none), got {int(rows.min())} "
                    f"to {int(rows.max())}"
                )

    def _raw(self, condition: Mapping[str, Any], x: Tensor, timestep: Tensor) -> Tensor:
        # States may be kept more exactly than the weights.
        return self.family.call(self.module, x.to(self._kind), timestep, condition).to(x.dtype)

    def _complete(self, x: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        """Everything the family takes, one row a sample, in the weights' type and x's place."""
        self._known(condition)
        given = {name: value for name, value in condition.items() if value is not None}
        if "prompt" in given:
            given = {**self._looked_up(given.pop("prompt")), **given}
        full = {}
        for name in self.family.conditions:
            value = given.get(name)
            if value is None and name in self.defaults:
                row = torch.as_tensor(self.defaults[name], dtype=torch.float32)
                value = row.expand(x.shape[0], *row.shape)
            elif value is None and name in self._nulls:
                value = self._null(name).expand(x.shape[0], *self._null(name).shape[1:])
            elif value is None and name == "guidance":
                continue
            elif value is None:
                raise ValueError(
                    f"{self.family.pipeline} needs the condition {name!r}: give encoded prompts"
                )
            # Guidance and sizes are numbers in the thousands, which half precision rounds.
            kind = self._kind if name in ("context", "pooled") else torch.float32
            full[name] = value.to(x.device, kind)
        return full

    @property
    def _kind(self) -> torch.dtype:
        """The type that the weights compute in."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    def _looked_up(self, prompt: Tensor) -> dict[str, Tensor]:
        """The embeddings of prompts; the last ones are kept, since every step asks for them."""
        table, last = self._table(), self._last
        if last is not None and last[0] is table:
            known = last[1]
            if known.device == prompt.device and torch.equal(known, prompt):
                return last[2]
        found = table.rows(prompt)
        self._last = table, prompt.clone(), found
        return found

    def _known(self, condition: Mapping[str, Any]) -> None:
        accepted = [*self.family.conditions, "prompt"]
        if not getattr(self.module.config, "guidance_embeds", True):
            accepted.remove("guidance")
        for name in condition:
            if name not in accepted:
                raise ValueError(
                    f"{self.family.pipeline} takes the conditions {', '.join(accepted)}, got "
                    f"{name!r}"
                )

    def _null(self, name: str) -> Tensor:
        if name not in self._nulls:
            raise ValueError(
                f"{self.family.pipeline} was read without its text encoders, so the null condition "
                f"of {name!r} is not known"
            )
        return self.get_buffer(f"null_{name}")

    def _table(self) -> PromptTable:
        if self.prompts is None:
            raise ValueError("prompt counts rows of a table of embeddings: call with_prompts first")
        return self.prompts


def _plain(module: nn.Module) -> dict[str, Any]:
    """The configuration of a diffusers network as JSON would return it."""
    values = {k: v for k, v in dict(module.config).items() if not k.startswith("_")}
    return json.loads(json.dumps(values))
