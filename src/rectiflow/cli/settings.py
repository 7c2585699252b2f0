"""Settings of a command from flags and a TOML file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rectiflow.errors import require, unknown

T = TypeVar("T")
# Makes settings of a class from values by name.
Make = Callable[[Any, dict[str, Any]], Any]
# Flags that may stand alone, with what they then mean.
ALONE = {"--tract": "0.1"}


def parse(
    kind: type[T],
    arguments: Sequence[str],
    *,
    command: str,
    summary: str,
    defaults: T | None = None,
) -> T:
    """The settings of a command.

    Flags win over the file, the file over the defaults.

    Args:
        kind: a dataclass; nested dataclasses become dotted flags.
        arguments: the words after the command.
        command: the command's name.
        summary: the first line of its help.
        defaults: settings to start from; `kind()` by default, if every field has a default.

    Raises:
        ValueError: a wrong file, flag or value; the message says which.
        SystemExit: after `--help`.
    """
    require("app", "tyro")
    import tyro

    words, file = _config_file(_spelled_out(arguments))
    if file is not None:
        defaults = _read(kind, file, defaults, _unchecked)
    options: dict[str, Any] = {} if defaults is None else {"default": defaults}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                args=words,
                prog=f"rectiflow {command}",
                description=f"{summary}\n\nAlso: --config FILE.toml with the same names; --debug.",
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_reason(stop) or _unboxed(complaint.getvalue())) from None


def _reason(stop: BaseException) -> str:
    """The message of the ValueError that a settings class raised, if that is what ended parsing."""
    error: BaseException | None = stop
    while error is not None:
        if type(error) is ValueError and _raised_in(error).startswith("rectiflow."):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


def _raised_in(error: BaseException) -> str:
    """The module in which an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


def _unboxed(text: str) -> str:
    """What tyro says in a box, as one line."""
    lines = (line.strip("│╰╯─ ") for line in text.splitlines() if not line.startswith("╭"))
    return " ".join(line for line in lines if line)


def _spelled_out(words: Sequence[str]) -> list[str]:
    """The words with the number of each flag that stands alone."""
    found: list[str] = []
    for word, after in zip(words, [*words[1:], ""]):
        found.append(word)
        if word in ALONE and not _is_number(after):
            found.append(ALONE[word])
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _config_file(words: list[str]) -> tuple[list[str], Path | None]:
    """Take `--config FILE` out of the words."""
    for index, word in enumerate(words):
        if word == "--config":
            if index + 1 == len(words):
                raise ValueError("--config needs a file")
            return words[:index] + words[index + 2 :], Path(words[index + 1])
        if word.startswith("--config="):
            return words[:index] + words[index + 1 :], Path(word.removeprefix("--config="))
    return words, None


def from_toml(kind: type[T], file: Path, defaults: T | None = None) -> T:
    """Settings from a TOML file over defaults. Dashes and underscores are alike in names."""
    return _read(kind, file, defaults, lambda kind, values: kind(**values))


def _unchecked(kind: Any, values: dict[str, Any]) -> Any:
    """Settings that were not looked at as a whole: flags may still change them."""
    made = object.__new__(kind)
    for field in dataclasses.fields(kind):
        if field.name in values:
            value = values[field.name]
        elif callable(field.default_factory):
            value = field.default_factory()
        else:
            value = field.default
        object.__setattr__(made, field.name, value)
    return made


def _read(kind: Any, file: Path, defaults: Any, make: Make) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {file}")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from None
    return _fill(kind, table, defaults, str(file), make)


def _fill(kind: Any, table: dict[str, Any], defaults: Any, where: str, make: Make) -> Any:
    import tyro

    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    values = {name: getattr(defaults, name) for name in fields} if defaults is not None else {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise unknown(f"setting in {where}", key, (n.replace("_", "-") for n in fields))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ValueError(f"{key} in {where} must be a table, got {value!r}")
            inner, factory = values.get(name), fields[name].default_factory
            if inner is None and callable(factory):
                inner = factory()
            values[name] = _fill(hint, value, inner, f"{where} [{key}]", make)
        else:
            values[name] = _value(key, value, hint, where)
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            # The flag may still come; tyro asks for it if it does not.
            values[name] = tyro.MISSING
    return make(kind, values)


def _value(key: str, value: Any, hint: Any, where: str) -> Any:
    """A TOML value as the type of the setting."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            if option is not type(None):
                try:
                    return _value(key, value, option, where)
                except ValueError:
                    continue
    elif origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(value):
            return tuple(_value(key, v, k, where) for v, k in zip(value, kinds))
    elif origin is typing.Literal:
        if value in inner:
            return value
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{key} in {where} must be {wanted}, got {value!r}")
