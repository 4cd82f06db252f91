"""Placeholders for classes and functions of a module, which is imported when one of them is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import Any, Union


class LazyName:
    """A placeholder for a class or a function of a module.

    The module is imported when the placeholder is called, subclassed, used in ``isinstance`` or asked for a name.
    """

    def __init__(self, module: str, name: str) -> None:
        self.__module__, self.__name__ = module, name

    @cached_property
    def _target(self) -> Any:
        module = sys.modules.get(self.__module__)
        if isinstance(module, PlaceholderModule):
            module.uninstall()
        return getattr(importlib.import_module(self.__module__), self.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._target(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what typing looks for in annotations
            raise AttributeError(name)
        return getattr(self._target, name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._target)

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._target)

    def __mro_entries__(self, _: tuple[Any, ...]) -> tuple[type]:
        return (self._target,)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - in an annotation; this is what | calls

    __ror__ = __or__


class PlaceholderModule(ModuleType):
    """Replaces a module in ``sys.modules``: each name that is imported from it is a :class:`LazyName`."""

    _replaced: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return LazyName(self.__name__, name)

    def install(self) -> None:
        """Replace the module in ``sys.modules``."""
        self._replaced = sys.modules.get(self.__name__)
        sys.modules[self.__name__] = self

    def uninstall(self) -> None:
        """Restore the entry in ``sys.modules``, unless that was done."""
        if sys.modules.get(self.__name__) is self:
            if self._replaced is None:
                del sys.modules[self.__name__]
            else:
                sys.modules[self.__name__] = self._replaced


@contextmanager
def with_placeholders(modules: Iterable[PlaceholderModule]) -> Iterator[None]:
    """Import other modules with these placeholders installed. Only one thread may do so at a time."""
    installed = list(modules)
    for module in installed:
        module.install()
    try:
        yield
    finally:
        for module in installed:
            module.uninstall()
