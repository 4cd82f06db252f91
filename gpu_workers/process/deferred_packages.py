"""Packages and modules whose own code runs late or never, while submodules can be imported.

Python locks a module while its code runs, after it locked the modules that import it. It raises where two threads would
wait for each other so; with a package's code deferred, they would meet more often. So the code runs under Python's lock
of the package, and one thread at a time imports modules of torch: it has the turn, before any lock of these modules.
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
_IN_TURN: Final = ("torch", "functorch")
"""Those whose modules import each other in circles through torch's compiler, which a thread of a rank imports."""
_LOOK_EVERY_S: Final = 0.05
_ModuleLock: Final[Any] = getattr(_BOOTSTRAP, "_ModuleLockManager", nullcontext)
"""Python's own; a version without it has our lock alone, for deferred packages."""


class _Turn:
    """The lock of the thread that imports modules of torch."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner = 0

    def take(self) -> bool:
        """Wait for the turn. Returns whether this thread has it.

        It goes on without if the one that has it waits for a module that this thread imports, which is none of torch.
        Python would find no deadlock there, since it knows nothing of the turn, and there was none before.
        """
        while not self._lock.acquire(timeout=_LOOK_EVERY_S):
            if self._waits_for_this_thread():
                return False
        self._owner = threading.get_ident()
        return True

    def end(self) -> None:
        self._lock.release()

    def _waits_for_this_thread(self) -> bool:
        lock_type = getattr(_BOOTSTRAP, "_ModuleLock", None)
        if lock_type is None:
            return False
        turn = lock_type("the turn to import modules of torch")  # for Python's own search, as if it were a module's
        turn.owner = self._owner
        return bool(turn.has_deadlock())


_TURN: Final = _Turn()


class _LockInTurn(_ModuleLock):
    """Python's lock of a module that is imported; for a module of torch, in the turn of this thread.

    Python looks whether the module is there once it has the lock. So a package's code that runs first runs before.

    Source: CPython, Lib/importlib/_bootstrap.py, "_find_and_load".
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._parent, _, _ = name.rpartition(".")
        self._is_in_turn = name.partition(".")[0] in _IN_TURN

    def __enter__(self) -> None:
        self._has_turn = self._is_in_turn and _TURN.take()
        try:
            package = sys.modules.get(self._parent)
            if isinstance(package, OnDemand) and package.RUNS_FIRST:
                package.run()
            super().__enter__()
        except BaseException:
            self._end_turn()
            raise

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._end_turn()

    def _end_turn(self) -> None:
        if self._has_turn:
            _TURN.end()


class Deferred(ModuleType):
    """A package whose own code has not run."""


class Never(Deferred):
    """One whose code does not run at all."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__}.{name}: workers import the modules of {self.__name__} one by one")


class OnDemand(Deferred):
    """One whose code runs when a name is asked for that is no submodule imported so far."""

    RUNS_FIRST = False
    """Whether the code also runs when one of the package's modules is imported, before that, as Python does."""

    _is_running = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for in any package
            raise AttributeError(name)
        self.run()
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None

    def run(self) -> None:
        """Run the package's own code, once."""
        with _LockInTurn(self.__name__):
            if isinstance(self, OnDemand) and not self._is_running:  # another thread may have run it meanwhile
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


def defer(name: str, kind: type[Deferred]) -> None:
    """Put a package in place without running its code, unless it was imported before."""
    if name in sys.modules:
        return
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent is not installed
        return
    if spec is None or spec.submodule_search_locations is None:
        return  # another version without this package: its importers say so
    place(spec, kind)
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, sys.modules[name])


def place(spec: ModuleSpec, kind: type[Deferred]) -> None:
    """Put a module in place without running its code."""
    _BOOTSTRAP._ModuleLockManager = _LockInTurn
    module = kind(spec.name)
    module.__spec__, module.__file__, module.__package__ = spec, spec.origin, spec.parent
    if spec.submodule_search_locations is not None:
        module.__path__ = list(spec.submodule_search_locations)
    sys.modules[spec.name] = module
