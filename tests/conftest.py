"""Shapes checked at run time in every test, and the repository's root on the import path.

rectiflow imports the names of its annotations under `TYPE_CHECKING`, so that users need no
jaxtyping. Here its modules are compiled with those imports unfolded, and every function that says
shapes is checked by jaxtyping and beartype, in its first calls of every test: the rest are the same
calls again, and checking all of them takes longer than the code under test. Setting
`typing.TYPE_CHECKING` itself breaks other packages.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, runtime_checkable

sys.path.insert(0, str(Path(__file__).parents[1]))

PACKAGE = "rectiflow"
DECORATOR, PROTOCOL = "checked_in_tests", "protocol_in_tests"
SHAPED = {"Bool", "Float", "Int", "UInt8"}
CALLS = 4
"""Calls of a function that are checked in each test."""
test_number = 0


def pytest_runtest_setup() -> None:
    global test_number
    test_number += 1


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, raising `jaxtyping.TypeCheckError` when its annotations do not hold.

    Arguments that the function refuses by itself (the family of ValueError) raise its own error.
    """
    import beartype
    import jaxtyping

    @functools.cache  # made at the first call, when every module is complete
    def strict() -> Callable[..., Any]:
        checker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
        return jaxtyping.jaxtyped(typechecker=checker)(function)

    within, calls = 0, 0

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal within, calls
        if within != test_number:
            within, calls = test_number, 0
        calls += 1
        if calls > CALLS:
            return function(*args, **kwargs)
        torch = sys.modules.get("torch")
        if torch is not None and torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return strict()(*args, **kwargs)
        except jaxtyping.TypeCheckError as error:
            if getattr(error, "settled", False):
                raise
            error.settled = True  # outer functions pass it on instead of trying again
            try:
                function(*args, **kwargs)
            except (ValueError, OSError, ImportError) as own:
                raise own from None
            except Exception:
                raise error from None
            raise

    return call


class _Checked(ast.NodeTransformer):
    """Unfold `if TYPE_CHECKING:` and decorate functions that say shapes, but not nested ones."""

    def __init__(self) -> None:
        self.late: list[ast.stmt] = []

    def visit_If(self, node: ast.If) -> Any:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            return node
        # Imports of the package's own modules come last, where circles do no harm.
        own = [
            s
            for s in node.body
            if isinstance(s, ast.ImportFrom) and (s.module or "").startswith(PACKAGE)
        ]
        self.late += own
        return [s for s in node.body if s not in own] or ast.Pass()

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases):
            node.decorator_list.append(ast.Name(PROTOCOL, ast.Load()))
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        annotations = [node.returns, *(a.annotation for a in arguments)]
        if any(_shaped(annotation) for annotation in annotations if annotation is not None):
            node.decorator_list.append(ast.Name(DECORATOR, ast.Load()))
        return node


def _shaped(annotation: ast.expr) -> bool:
    return any(isinstance(n, ast.Name) and n.id in SHAPED for n in ast.walk(annotation))


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        # No cached bytecode: the plain and the checked form share a file name.
        path = self.get_filename(fullname)
        visitor = _Checked()
        tree = visitor.visit(ast.parse(self.get_data(path), path))
        tree.body += visitor.late
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, DECORATOR, checked)
        setattr(module, PROTOCOL, runtime_checkable)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


if all(importlib.util.find_spec(name) for name in ("jaxtyping", "beartype")):
    sys.meta_path.insert(0, _Finder())
