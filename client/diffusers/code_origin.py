"""Find functions of torch, diffusers and transformers that this process has replaced: workers run the original ones."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from itertools import chain
from operator import attrgetter, is_
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final

import torch

from xditd.ipc.errors import Unsupported
from xditd.ipc.module_state import PACKAGES

_ALSO_USED: Final = ("torch", "torch.nn.functional", "diffusers.models.attention_dispatch")
"""Modules whose functions forwards call by name."""

_BUILTIN: Final = ("scaled_dot_product_attention", "linear", "gelu")
"""Functions of ``torch.nn.functional`` that are compiled, and that other libraries replace with their own."""


_PART_NAMES: Final = ("__code__", "__defaults__", "__kwdefaults__")
_PARTS: Final = attrgetter(*_PART_NAMES)
"""What a function computes with, and what a program can replace without replacing the function."""


def namespaces_of(module: torch.nn.Module) -> list[type | ModuleType]:
    """Return the classes of a module, of its submodules and of the objects in them, and the modules that define them.

    Those of other packages are left out: workers have none of them.
    """
    kinds = {type(each) for each in module.modules()}
    for each in module.modules():
        kinds.update(type(value) for value in vars(each).values())
    classes = {each: None for kind in sorted(kinds, key=repr) for each in kind.__mro__ if _is_known(each.__module__)}
    names = {each.__module__: None for each in classes if each.__module__.partition(".")[0] != "torch"}
    modules = [sys.modules[name] for name in names if name in sys.modules]
    return [*classes, *modules, *map(import_module, _ALSO_USED), torch.Tensor]


def check_code(namespaces: Iterable[type | ModuleType], label: str) -> None:
    """Check that all functions in classes and modules are those of the installed packages.

    Raises:
        Unsupported: a function was replaced in this process, and workers run the original one; the error names it.
    """
    for namespace in namespaces:
        where = (
            f"{namespace.__module__}.{namespace.__qualname__}" if isinstance(namespace, type) else namespace.__name__
        )
        for name, value in vars(namespace).items():
            if _is_foreign(name, value):
                raise Unsupported(
                    f"{label}: {where}.{name} was replaced by {value!r:.100} in this process, which workers do not "
                    "have: restore it, or leave this model out of components"
                )
            for function in _functions_of(value):
                if not _has_own_code(function):
                    code = function.__code__
                    raise Unsupported(
                        f"{label}: the code of {where}.{name} was replaced by that of {code.co_name} in "
                        f"{code.co_filename}, which workers do not have: restore it, or leave this model out of "
                        "components"
                    )
                if not _is_original(namespace, name, function):
                    raise Unsupported(
                        f"{label}: {where}.{name} was replaced by {function.__module__}.{function.__qualname__} in "
                        "this process, which workers cannot run: restore it, or leave this model out of components"
                    )
    for name in _BUILTIN:
        found = getattr(torch.nn.functional, name)
        if not isinstance(found, BuiltinFunctionType):
            raise Unsupported(
                f"{label}: torch.nn.functional.{name} was replaced by a {type(found).__name__} in this process, which "
                "workers cannot run: restore it, or leave this model out of components"
            )


class CodeRecord:
    """The code and the defaults of all functions in classes and modules, as they are now."""

    def __init__(self, namespaces: Iterable[type | ModuleType]) -> None:
        values = (value for namespace in namespaces for value in vars(namespace).values())
        self._functions = list({id(each): each for value in values for each in _functions_of(value)}.values())
        self._parts = self._take()

    def is_same(self) -> bool:
        """Return whether no function has other code or defaults; takes 0.1 ms for FLUX.1."""
        return all(map(is_, chain.from_iterable(map(_PARTS, self._functions)), self._parts))

    def check(self) -> None:
        """Refuse what :meth:`is_same` finds.

        Raises:
            Unsupported: a function has other code or defaults, and workers run the original one; the error names it.
        """
        for number, (found, before) in enumerate(zip(self._take(), self._parts, strict=True)):
            if found is not before:
                function = self._functions[number // len(_PART_NAMES)]
                raise Unsupported(
                    f"{function.__module__}.{function.__qualname__}: its {_PART_NAMES[number % len(_PART_NAMES)]} was "
                    "replaced within the accelerate block, and workers run the original function: restore it, or leave "
                    "this model out of components"
                )

    def _take(self) -> list[Any]:
        return list(chain.from_iterable(map(_PARTS, self._functions)))


def _is_foreign(name: str, value: Any) -> bool:
    """Return whether a class, or an object that can be called, is one of this program, or changes the arguments of a
    function in whose place it stands."""
    if not callable(value) or isinstance(value, (FunctionType, BuiltinFunctionType)):
        return False
    if isinstance(value, functools.partial):
        return getattr(value.func, "__name__", None) == name or _is_foreign(name, value.func)
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__ == "__main__":
        return True
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return file is not None and not _is_installed(file, in_packages=False)


def _functions_of(value: Any) -> Iterator[FunctionType]:
    """Yield the functions in an attribute of a class or a module, and those that their decorators wrap."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.partial):
        value = value.func
    while isinstance(value, FunctionType):
        yield value
        value = vars(value).get("__wrapped__")


def _is_original(namespace: type | ModuleType, name: str, function: FunctionType) -> bool:
    is_forward = isinstance(namespace, type) and name in ("forward", "__call__")
    # Other methods have decorators of further packages that are installed.
    if not _is_installed(function.__code__.co_filename, in_packages=is_forward):
        return False
    # A forward of another class is in an installed file too.
    return not is_forward or "<locals>" in function.__qualname__ or function.__module__ == namespace.__module__


def _has_own_code(function: FunctionType) -> bool:
    """Return whether a function has the code with which it was defined, as far as names show it."""
    code = function.__code__
    if code.co_filename.startswith("<"):  # made by dataclasses, for example
        return True
    if code.co_filename != function.__globals__.get("__file__"):
        return False
    name = getattr(code, "co_qualname", "<locals>")  # Python 3.10 has none
    return "<locals>" in name or "__wrapped__" in vars(function) or name == function.__qualname__  # decorators rename


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


@cache
def _is_installed(file: str, *, in_packages: bool) -> bool:
    """Return whether a file is installed: with ``in_packages`` by one of the packages or Python itself, else by any."""
    folders = _folders() if in_packages else (*_folders(), *(str(Path(each).parent) for each in _folders()))
    return file.startswith("<") or any(file.startswith(f"{folder}{os.sep}") for folder in folders)


@cache
def _folders() -> tuple[str, ...]:
    packages = (sys.modules[name] for name in PACKAGES if name in sys.modules)
    folders = [str(Path(each.__file__).parent) for each in packages if each.__file__ is not None]
    return (*folders, sysconfig.get_path("stdlib"))
