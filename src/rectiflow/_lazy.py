"""Names that import their module at first use, so that `import rectiflow` stays free of torch."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # importing typing for its own name would take twice as long as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def attach(
    package: str, exports: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build `__getattr__`, `__dir__` and `__all__` for a package whose names load on demand.

    Args:
        package: the package's `__name__`.
        exports: submodule name to the public names it defines. An empty tuple exports the
            submodule itself. A dotted name is that of a module of another package, whose names
            this one offers too.

    Returns:
        the three objects, to be assigned at package level (PEP 562).
    """
    owner = {
        name: module if "." in module else f"{package}.{module}"
        for module, names in exports.items()
        for name in names
    }
    public = sorted({*owner, *(module for module in exports if "." not in module)})

    def load(name: str) -> Any:
        if name in owner:
            return getattr(importlib.import_module(owner[name]), name)
        if name in exports:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load, lambda: public, public
