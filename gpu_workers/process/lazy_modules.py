"""Modules and packages that are in ``sys.modules`` before their own code runs, or whose own code never runs.

Submodules of such a package can be imported. Only the main thread of a rank imports modules late, so that no two
threads wait for each other's modules (docs/starts.md).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final


class SubmodulesOnly(ModuleType):
    """A package whose own code never runs: only its submodules can be imported."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__}.{name}: workers import the modules of {self.__name__} one by one")


class LazyModule(ModuleType):
    """A module whose code runs when a name is asked for that is no submodule imported so far.

    Names of this class hide those of the module's own code, until it has run.
    """

    RUNS_BEFORE_SUBMODULES = False
    """Whether the code of a package also runs before one of its submodules is imported, as in Python's own order."""

    _is_running = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._own_code_lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # what Python itself looks for in any package
            raise AttributeError(name)
        self.run_own_code()
        if name not in self.__dict__ and isinstance(self, LazyModule):  # its code runs in this very moment
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self, name)  # the code may have a function of this name, as modules can

    def __dir__(self) -> Iterable[str]:
        self.run_own_code()
        return ModuleType.__dir__(self)  # it is no LazyModule any more

    @property
    def runs_first(self) -> bool:
        """Whether the code of a package has to run before a submodule is imported now."""
        return self.RUNS_BEFORE_SUBMODULES and not self._is_running

    def run_own_code(self) -> None:
        """Run the module's own code, once."""
        with self._own_code_lock:
            if isinstance(self, LazyModule) and not self._is_running:  # another thread may have run it meanwhile
                self._is_running = True
                self._begin()
                assert self.__spec__ is not None
                assert self.__spec__.loader is not None
                try:
                    self.__spec__.loader.exec_module(self)
                    self._end()
                    self.__class__ = ModuleType  # type: ignore[assignment]
                except BaseException:
                    self._end_failed()
                    raise
                finally:
                    self._is_running = False

    def _begin(self) -> None:
        """Called before the code runs."""

    def _end(self) -> None:
        """Called after the code has run."""

    def _end_failed(self) -> None:
        """Called if the code raises. It runs again when a name is asked for, and raises again."""


class _PackageFirst(MetaPathFinder, Loader):
    """Finds submodules of a package whose own code has to run first; runs that code, then imports as Python does.

    The package's code may import the submodule, too. So ``create_module`` imports it, and makes no other one.
    """

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        package = sys.modules.get(fullname.rpartition(".")[0])
        return ModuleSpec(fullname, self) if isinstance(package, LazyModule) and package.runs_first else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        package = sys.modules[spec.parent or ""]
        if isinstance(package, LazyModule):
            package.run_own_code()
        module = importlib.import_module(spec.name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader is self:  # a module may refuse the spec that Python sets
            module.__spec__ = spec.loader_state


_PACKAGE_FIRST: Final = _PackageFirst()


def defer_package(name: str, kind: type[ModuleType]) -> None:
    """Put a package into ``sys.modules`` without running its code, unless it was imported before.

    ``kind`` is :class:`LazyModule`, a subclass of it, or :class:`SubmodulesOnly`.
    """
    if name in sys.modules:
        return
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent is not installed
        return
    if spec is None or spec.submodule_search_locations is None:
        return  # another version without this package: its importers say so
    defer_module(spec, kind)
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, sys.modules[name])


def defer_module(spec: ModuleSpec, kind: type[ModuleType]) -> None:
    """Put a module into ``sys.modules`` without running its code; ``kind`` as in :func:`defer_package`."""
    if _PACKAGE_FIRST not in sys.meta_path:
        sys.meta_path.insert(0, _PACKAGE_FIRST)
    module = kind(spec.name)
    module.__spec__, module.__file__, module.__package__ = spec, spec.origin, spec.parent
    if spec.submodule_search_locations is not None:
        module.__path__ = list(spec.submodule_search_locations)
    sys.modules[spec.name] = module
