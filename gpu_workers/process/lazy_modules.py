"""Modules and packages that are in ``sys.modules`` before their own code runs, or without that it ever runs.

Submodules of such a package can be imported. Python locks a module while its code runs, and raises where two threads
would wait for each other's modules. A package whose code runs late would make such cases more frequent. So its code
runs under Python's lock of the package, and one thread at a time imports modules of torch: it holds a lock of ours
before any of Python's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

_BOOTSTRAP: Final[Any] = importlib._bootstrap
_TORCH_PACKAGES: Final = ("torch", "functorch")
"""Packages whose modules import each other in circles through torch's compiler, which a thread of a rank imports."""
_CHECK_EVERY_S: Final = 0.05
_PythonModuleLock: Final[Any] = getattr(_BOOTSTRAP, "_ModuleLockManager", nullcontext)
"""Python's lock of a module that is imported. In a version of Python without it there is only our lock."""


class _TorchImportLock:
    """The lock of the one thread that imports modules of torch."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner = 0

    def acquire(self) -> bool:
        """Wait for the lock, and return whether this thread holds it.

        It goes on without the lock if the thread that holds it waits for a module that this thread imports, such as a
        package that imports torch and that torch imports. Python sees no deadlock there, as it does not know this lock.
        """
        while not self._lock.acquire(timeout=_CHECK_EVERY_S):
            if self._is_deadlock():
                return False
        self._owner = threading.get_ident()
        return True

    def release(self) -> None:
        self._lock.release()

    def _is_deadlock(self) -> bool:
        lock_class = getattr(_BOOTSTRAP, "_ModuleLock", None)
        if lock_class is None:
            return False
        lock = lock_class("modules of torch")  # for Python's own search, as if it were the lock of a module
        lock.owner = self._owner
        return bool(lock.has_deadlock())


_TORCH_IMPORT_LOCK: Final = _TorchImportLock()


class _ModuleLock(_PythonModuleLock):
    """Python's lock of a module that is imported, taken after :data:`_TORCH_IMPORT_LOCK` if the module is of torch.

    With Python's lock, Python looks whether the module is in ``sys.modules``. So the code of a package with
    ``RUNS_BEFORE_SUBMODULES`` runs before Python's lock of the submodule is taken.

    Source: CPython, Lib/importlib/_bootstrap.py, "_find_and_load".
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._parent, _, _ = name.rpartition(".")
        self._is_of_torch = name.partition(".")[0] in _TORCH_PACKAGES

    def __enter__(self) -> None:
        self._holds_torch = self._is_of_torch and _TORCH_IMPORT_LOCK.acquire()
        try:
            package = sys.modules.get(self._parent)
            if isinstance(package, LazyModule) and package.RUNS_BEFORE_SUBMODULES:
                package.run_own_code()
            super().__enter__()
        except BaseException:
            self._release_torch()
            raise

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._release_torch()

    def _release_torch(self) -> None:
        if self._holds_torch:
            _TORCH_IMPORT_LOCK.release()


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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # what Python itself looks for in any package
            raise AttributeError(name)
        self.run_own_code()
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None

    def run_own_code(self) -> None:
        """Run the module's own code, once."""
        with _ModuleLock(self.__name__):
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
    _BOOTSTRAP._ModuleLockManager = _ModuleLock
    module = kind(spec.name)
    module.__spec__, module.__file__, module.__package__ = spec, spec.origin, spec.parent
    if spec.submodule_search_locations is not None:
        module.__path__ = list(spec.submodule_search_locations)
    sys.modules[spec.name] = module
