"""Guidance from words, such as `4`, `cfg:4,stop=0.8` or `apg:7.5,eta=0,momentum=-0.5,norm=15`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from rectiflow.errors import positive, unknown
from rectiflow.guidance.presets import preset

# Kind: the class of `rectiflow.guidance`, and the numbers it takes by name.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cfg": ("ClassifierFreeGuidance", ("scale", "rescale", "start", "stop", "negative")),
    "apg": ("APG", ("scale", "eta", "momentum", "norm", "start", "stop", "negative")),
}
FORMS = "4, cfg:4,start=0.1,stop=0.8, apg:7.5,eta=0,momentum=-0.5,norm=15 or apg:sdxl"


@dataclass(frozen=True)
class GuidanceSpec:
    """What words said about guidance.

    Attributes:
        kind: cfg or apg.
        settings: the arguments of its class.
    """

    kind: str
    settings: dict[str, Any]

    def around(self, field: Any) -> Any:
        """The guided field.

        Raises:
            ValueError: a setting is out of its range.
        """
        made = getattr(importlib.import_module("rectiflow.guidance"), KINDS[self.kind][0])
        return made(field, **self.settings)


def parse_guidance(text: str | float) -> GuidanceSpec:
    """What a text says about guidance.

    A number alone is the scale of classifier-free guidance. `cfg:` and `apg:` take the scale first
    and then `name=value` pairs; `apg:` also takes a model family in place of the scale.
    `negative=LABEL` guides away from a class instead of from none.

    Args:
        text: such as `4`, `cfg:4,start=0.1,stop=0.8`, `apg:7.5,eta=0,norm=15`, `apg:sdxl`.

    Raises:
        ValueError: an unknown kind, family or setting (the closest is suggested), a value that is
            not a number, or a setting given twice.

    Example:
        >>> parse_guidance("apg:7.5,eta=0,norm=15").settings
        {'scale': 7.5, 'eta': 0.0, 'norm': 15.0}
        >>> parse_guidance("4").kind
        'cfg'
    """
    kind, colon, rest = str(text).strip().partition(":")
    if not colon:
        kind, rest = ("cfg", kind) if _is_number(kind) else (kind, "")
    if kind not in KINDS:
        raise unknown("guidance", kind, KINDS)
    first, *pairs = [part.strip() for part in rest.split(",")]
    settings = _first(kind, first, text)
    named: set[str] = {"scale"} if _is_number(first) else set()
    for pair in [first, *pairs] if "=" in first else pairs:
        name, equals, value = (word.strip() for word in pair.partition("="))
        if not equals:
            raise ValueError(f"guidance {str(text)!r} is not understood: write {FORMS}")
        if name not in KINDS[kind][1]:
            raise unknown(f"setting of {kind}", name, KINDS[kind][1])
        if name in named:
            raise ValueError(f"guidance {str(text)!r} gives {name} twice: give it once")
        named.add(name)
        settings[name] = _number(name, value, text)
    if "scale" not in settings:
        raise ValueError(f"guidance {str(text)!r} has no scale: write {FORMS}")
    positive("guidance", settings["scale"], zero=True)
    if "negative" in settings:
        settings["negative"] = {"label": int(settings["negative"])}
    return GuidanceSpec(kind, settings)


def _first(kind: str, word: str, text: str | float) -> dict[str, Any]:
    """The settings that the first word after the colon stands for."""
    if not word or "=" in word:
        return {}
    if _is_number(word):
        return {"scale": float(word)}
    if kind == "apg":
        return preset(word)
    raise ValueError(f"guidance {str(text)!r} is not understood: write {FORMS}")


def _number(name: str, value: str, text: str | float) -> float:
    if not _is_number(value) or (name == "negative" and not value.isdigit()):
        wanted = "a class label" if name == "negative" else "a number"
        raise ValueError(f"{name} in guidance {str(text)!r} must be {wanted}, got {value!r}")
    return float(value)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
