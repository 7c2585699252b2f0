"""The `rectiflow` command. Help and listing load nothing but this package and the catalog."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from rectiflow.cli.commands import COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0 is success, 1 a failed check, 2 a wrong use or input (one line on stderr), 130 an interrupt.
    `--debug` anywhere shows tracebacks.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    if given[0] in ("-V", "--version"):
        from rectiflow import __version__

        print(f"rectiflow {__version__}")
        return 0
    name, rest = given[0], given[1:]
    try:
        if name not in COMMANDS:
            from rectiflow.errors import unknown

            raise unknown("command", name, COMMANDS)
        return int(importlib.import_module(COMMANDS[name].module).main(rest) or 0)
    except KeyboardInterrupt as stop:
        print(
            f"rectiflow: interrupted ({stop})" if str(stop) else "rectiflow: interrupted",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if debug or not _expected(error):
            raise
        print(f"rectiflow {name}: {_line(error)}", file=sys.stderr)
        return 2


def usage() -> str:
    """What `rectiflow --help` prints."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())
    return (
        "rectiflow: learn, straighten and use flows.\n\n"
        "usage: rectiflow COMMAND [options]      (rectiflow COMMAND --help lists them)\n\n"
        f"{rows}\n\n"
        "Every option can also stand in a TOML file: --config FILE. --debug shows tracebacks."
    )


def _expected(error: Exception) -> bool:
    """Whether an error is about the user's input or machine, not a defect."""
    from rectiflow.errors import NonFiniteLossError

    return isinstance(error, ValueError | OSError | ImportError | NonFiniteLossError)


def _line(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return f"{error.name} is not installed: pip install 'rectiflow[app]'"
    text = " ".join(str(error).split())
    return text or type(error).__name__
