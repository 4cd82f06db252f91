"""Import modules of diffusers without those of transformers: most of what they take to import.

diffusers' models and pipelines name classes of transformers, mostly in annotations. Text encoders import them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final, Union

_TRANSFORMERS: Final = "transformers"


class _LateClass:
    """A class, or a function, of transformers under its name, which is imported when something is asked of it."""

    def __init__(self, name: str) -> None:
        self.__name__, self.__module__ = name, _TRANSFORMERS

    @cached_property
    def _found(self) -> Any:
        names = sys.modules.get(_TRANSFORMERS)
        if isinstance(names, _Names):
            names.leave()
        return getattr(importlib.import_module(_TRANSFORMERS), self.__name__)

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


class _Names(ModuleType):
    """transformers, for modules that only name its classes."""

    def __init__(self, spec: ModuleSpec, version: str) -> None:
        super().__init__(_TRANSFORMERS)
        self._real = sys.modules.get(_TRANSFORMERS)
        self.__spec__, self.__version__ = spec, version
        self.__path__ = list(spec.submodule_search_locations or ())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _LateClass(name)

    def enter(self) -> None:
        """Take the place of transformers."""
        sys.modules[_TRANSFORMERS] = self

    def leave(self) -> None:
        """Give the place back, unless that was done."""
        if sys.modules.get(_TRANSFORMERS) is self:
            if self._real is None:
                del sys.modules[_TRANSFORMERS]
            else:
                sys.modules[_TRANSFORMERS] = self._real


@contextmanager
def without_transformers() -> Iterator[None]:
    """Let modules of diffusers be imported without the modules of transformers' models.

    What they import from transformers stands for its classes, which are imported when one is called, subclassed or
    asked for. For one thread. Where transformers is not installed as a package, they find what there is.
    """
    spec, version = None, ""
    with suppress(ValueError, metadata.PackageNotFoundError):  # imported without a spec, or a folder without a version
        spec, version = importlib.util.find_spec(_TRANSFORMERS), metadata.version(_TRANSFORMERS)
    if spec is None:
        yield
        return
    names = _Names(spec, version)
    names.enter()
    try:
        yield
    finally:
        names.leave()
