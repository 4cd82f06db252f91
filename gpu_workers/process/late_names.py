"""Modules that are imported when something is asked of the names that others have imported from them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import Any, Union


class LateName:
    """A class or a function of a module that is imported when it is called, subclassed or asked for something."""

    def __init__(self, module: str, name: str) -> None:
        self.__module__, self.__name__ = module, name

    @cached_property
    def _found(self) -> Any:
        place = sys.modules.get(self.__module__)
        if isinstance(place, LateModule):
            place.leave()
        return getattr(importlib.import_module(self.__module__), self.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what typing looks for in annotations
            raise AttributeError(name)
        return getattr(self._found, name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._found)

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._found)

    def __mro_entries__(self, _: tuple[Any, ...]) -> tuple[type]:
        return (self._found,)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - in an annotation; this is what | calls

    __ror__ = __or__


class LateModule(ModuleType):
    """What stands for a module while others are imported: each name that they import from it is a :class:`LateName`."""

    _real: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return LateName(self.__name__, name)

    def enter(self) -> None:
        """Take the module's place."""
        self._real = sys.modules.get(self.__name__)
        sys.modules[self.__name__] = self

    def leave(self) -> None:
        """Give the place back, unless that was done."""
        if sys.modules.get(self.__name__) is self:
            if self._real is None:
                del sys.modules[self.__name__]
            else:
                sys.modules[self.__name__] = self._real


@contextmanager
def in_place(modules: Iterable[LateModule]) -> Iterator[None]:
    """Let others be imported with these in place. For one thread."""
    entered = list(modules)
    for module in entered:
        module.enter()
    try:
        yield
    finally:
        for module in entered:
            module.leave()
