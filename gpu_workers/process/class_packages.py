"""Packages of classes that import only the module of the class that is asked for."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from xditd.gpu_workers.process.lazy_modules import LazyModule

_ALWAYS: Final = "is_torch_available"
"""The one condition of imports that is true in a rank."""


class ClassPackage(LazyModule):
    """A package that imports only the module of the class that is asked for.

    Its own code runs for any other name, and for one that it does not import in every case.
    """

    _module_by_name: dict[str, str] | None = None

    def __getattr__(self, name: str) -> Any:
        module = None if name.startswith("__") else self.modules().get(name)
        if module is None:
            return super().__getattr__(name)
        return getattr(importlib.import_module(f"{self.__name__}.{module}"), name)

    def modules(self) -> dict[str, str]:
        """Return the module of each name that the package's code imports in any case, as its source says."""
        if self._module_by_name is None:
            self._module_by_name = _modules_in(ast.parse(Path(str(self.__file__)).read_bytes()))
        return self._module_by_name


def _modules_in(code: ast.Module) -> dict[str, str]:
    """Return the module of each name that a package's code imports in any case, and assigns nowhere else.

    A name that is also a submodule's is left out: which of them the package has depends on the order of imports.
    """
    found: dict[str, str] = {}
    for each in _unconditional(code.body):
        if isinstance(each, ast.ImportFrom) and each.level == 1 and each.module:
            found |= {name.name: each.module for name in each.names if name.asname is None}
    bound = Counter(_bound_names(code))
    submodules = {module.partition(".")[0] for module in found.values()}
    return {name: module for name, module in found.items() if bound[name] == 1 and name not in submodules}


def _unconditional(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for each in body:
        test = each.test if isinstance(each, ast.If) else None
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == _ALWAYS:
            yield from each.body  # type: ignore[attr-defined]
        else:
            yield each


def _bound_names(code: ast.Module) -> Iterator[str]:
    """Return each name as often as any statement of the code binds or deletes it."""
    for each in ast.walk(code):
        if isinstance(each, ast.alias):
            yield each.asname or each.name
        elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield each.name
        elif isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load):
            yield each.id
