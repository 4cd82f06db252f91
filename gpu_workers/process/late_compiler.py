"""torch's compiler, imported when more of it is asked for than marks: three quarters of what diffusers' base imports.

diffusers, xfuser, einops and torch itself mark functions and classes for ``torch.compile`` while they are imported.
The marks are kept, and hold for a ``torch.compile`` that comes later.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, update_wrapper
from types import SimpleNamespace
from typing import Any, Final

import torch

from xditd.gpu_workers.process.deferred_packages import OnDemand, defer

COMPILER: Final = "torch._dynamo"
"""torch's compiler."""
_OF_FLEX_ATTENTION: Final = f"{COMPILER}._trace_wrapped_higher_order_op"
"""The module of the compiler that flex attention imports, and with it transformers."""
_MARKS: Final = ("allow_in_graph", "assume_constant_result", "disable")


class _Compiler(OnDemand):
    """The compiler for modules that only mark things for it. The code runs when another name, or one of its modules, is
    asked for."""

    RUNS_FIRST = True

    _marks: _Marks

    def add_marks(self) -> None:
        """Add the names that may be asked for before the code runs."""
        for name in _MARKS:
            setattr(self, name, getattr(self._marks, name))
        # init_process_group lets the compiler forget what it knows.
        self.trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)

    def _begin(self) -> None:
        for name in (*_MARKS, "trace_rules"):
            self.__dict__.pop(name, None)

    def _end(self) -> None:
        self._marks.apply()

    def _end_failed(self) -> None:
        self._marks.may_apply = False
        self.add_marks()  # what only marks things goes on without the compiler

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let its modules be imported without the package's own code."""
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False


class _Marks:
    """The compiler's functions that mark others. Before its code runs, they keep what they mark; afterwards they are
    the compiler's own, also for modules that have imported these."""

    def __init__(self, compiler: _Compiler) -> None:
        self._compiler: Any = compiler
        self._kept: list[Callable[[], object]] = []
        self.may_apply = False

    def allow_in_graph(self, fn: Any) -> Any:
        return self._mark("allow_in_graph", fn)

    def assume_constant_result(self, fn: Any) -> Any:
        return self._mark("assume_constant_result", fn)

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        if fn is None:
            return partial(self.disable, recursive=recursive, **options)
        if isinstance(fn, type):
            return self._mark("disable", fn, recursive=recursive, **options)
        if self.may_apply or not callable(fn) or isinstance(fn, torch.nn.Module):
            return self.own("disable")(fn, recursive, **options)
        return self._disable_later(fn, recursive, options)

    def apply(self) -> None:
        """Mark what was kept. From now on a mark is one of the compiler's at once."""
        self.may_apply = True
        for mark in self._kept:
            mark()
        self._kept = []

    def own(self, name: str) -> Any:
        """Return the compiler's own function of this name, whose code runs for it."""
        if not self.may_apply:
            self._compiler.run()
        return getattr(self._compiler, name)

    def _mark(self, name: str, fn: Any, **options: Any) -> Any:
        if not callable(fn):  # a list of functions, or a fault
            return self.own(name)(fn, **options)
        if not self.may_apply:
            self._kept.append(lambda: self.own(name)(fn, **options))
        if self.may_apply:  # also if that began in another thread meanwhile
            self.own(name)(fn, **options)
        return fn

    def _disable_later(self, fn: Callable[..., Any], recursive: bool, options: dict[str, Any]) -> Callable[..., Any]:
        own = None

        def disabled(*args: Any, **kwargs: Any) -> Any:
            nonlocal own
            if own is None and self.may_apply:
                own = self._compiler.disable(fn, recursive, **options)
            return (fn if own is None else own)(*args, **kwargs)

        # As the compiler's own function has them: what calls this one is traced without it.
        vars(update_wrapper(disabled, fn)).update(
            _torchdynamo_disable=True,
            _torchdynamo_disable_msg=options.get("reason"),
            _torchdynamo_disable_recursive=recursive,
            _torchdynamo_orig_callable=fn,
            _torchdynamo_wrapper_id=id(disabled),
        )
        return disabled


def defer_compiler() -> None:
    """Put what marks things in the compiler's place, unless it was imported before."""
    if COMPILER in sys.modules:
        return
    defer(COMPILER, _Compiler)
    compiler = sys.modules[COMPILER]
    assert isinstance(compiler, _Compiler)
    compiler._marks = _Marks(compiler)
    compiler.add_marks()
    # Of another version without it, or one that cannot be imported: its importers say so.
    with suppress(Exception), compiler.alone():
        importlib.import_module(_OF_FLEX_ATTENTION)
