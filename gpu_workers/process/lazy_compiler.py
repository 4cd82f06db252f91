"""Import torch's compiler only when it is used: it is three quarters of what diffusers' base imports.

diffusers, xfuser, einops and torch itself mark functions and classes for ``torch.compile`` while they are imported.
The marks are kept, and applied once the compiler is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, update_wrapper
from typing import Any, Final

import torch

from xditd.gpu_workers.process.lazy_modules import LazyModule, defer_package

COMPILER: Final = "torch._dynamo"
"""torch's compiler."""
_FLEX_ATTENTION_PART: Final = f"{COMPILER}._trace_wrapped_higher_order_op"
"""The module of the compiler that flex attention imports, and with it transformers."""
_MARKS: Final = ("allow_in_graph", "assume_constant_result", "disable")


class _LazyCompiler(LazyModule):
    """The compiler's package for modules that only mark functions and classes.

    Its code runs when any other name, or one of its submodules, is asked for.
    """

    RUNS_BEFORE_SUBMODULES = True

    _marks: _Marks

    def add_marks(self) -> None:
        """Add the names that may be asked for before the code runs."""
        for name in _MARKS:
            setattr(self, name, getattr(self._marks, name))
        self.trace_rules = _TraceRules(self._marks)

    def _begin(self) -> None:
        for name in (*_MARKS, "trace_rules"):
            self.__dict__.pop(name, None)

    def _end(self) -> None:
        self._marks.apply()

    def _end_failed(self) -> None:
        self._marks.is_applied = False
        self.add_marks()  # marks still work without the compiler

    @contextmanager
    def submodules_only(self) -> Iterator[None]:
        """Let submodules be imported without running the package's own code."""
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False


class _Marks:
    """The functions of the compiler that mark functions and classes.

    Before the compiler's code runs, they keep what they mark. Afterwards they call the compiler's own functions, also
    for modules that have imported these.
    """

    def __init__(self, compiler: _LazyCompiler) -> None:
        self._compiler: Any = compiler
        self._kept: list[Callable[[], object]] = []
        self.is_applied = False

    def allow_in_graph(self, fn: Any) -> Any:
        return self._mark("allow_in_graph", fn)

    def assume_constant_result(self, fn: Any) -> Any:
        return self._mark("assume_constant_result", fn)

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        if fn is None:
            return partial(self.disable, recursive=recursive, **options)
        if isinstance(fn, type):
            return self._mark("disable", fn, recursive=recursive, **options)
        if self.is_applied or not callable(fn) or isinstance(fn, torch.nn.Module):
            return self.from_compiler("disable")(fn, recursive, **options)
        return self._disable_later(fn, recursive, options)

    def apply(self) -> None:
        """Apply the marks that were kept. Later ones are applied at once."""
        self.is_applied = True
        for mark in self._kept:
            mark()
        self._kept = []

    def from_compiler(self, name: str) -> Any:
        """Return the compiler's own function of this name; its code runs for that, if it has not."""
        if not self.is_applied:
            self._compiler.run_own_code()
        return getattr(self._compiler, name)

    def _mark(self, name: str, fn: Any, **options: Any) -> Any:
        if not callable(fn):  # a list of functions, or a fault
            return self.from_compiler(name)(fn, **options)
        if not self.is_applied:
            self._kept.append(lambda: self.from_compiler(name)(fn, **options))
        if self.is_applied:  # also if another thread has begun to apply them meanwhile
            self.from_compiler(name)(fn, **options)
        return fn

    def _disable_later(self, fn: Callable[..., Any], recursive: bool, options: dict[str, Any]) -> Callable[..., Any]:
        """Return a function that calls ``fn``, or once the compiler is imported, what the compiler makes of it."""
        of_compiler = None

        def disabled(*args: Any, **kwargs: Any) -> Any:
            nonlocal of_compiler
            if of_compiler is None and self.is_applied:
                of_compiler = self._compiler.disable(fn, recursive, **options)
            return (fn if of_compiler is None else of_compiler)(*args, **kwargs)

        # The compiler's own disabled function has these attributes: they keep the tracer out of it.
        vars(update_wrapper(disabled, fn)).update(
            _torchdynamo_disable=True,
            _torchdynamo_disable_msg=options.get("reason"),
            _torchdynamo_disable_recursive=recursive,
            _torchdynamo_orig_callable=fn,
            _torchdynamo_wrapper_id=id(disabled),
        )
        return disabled


class _TraceRules:
    """What stands for the compiler's module of this name. ``init_process_group`` calls one of its functions, to clear
    caches that are empty before the compiler's own code has run; any other name runs that."""

    def __init__(self, marks: _Marks) -> None:
        self._marks = marks

    def clear_lru_cache(self) -> None:
        if self._marks.is_applied:
            self._marks.from_compiler("trace_rules").clear_lru_cache()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._marks.from_compiler("trace_rules"), name)


def defer_compiler() -> None:
    """Put the compiler's package into ``sys.modules`` without running its code, unless it was imported before."""
    if COMPILER in sys.modules:
        return
    defer_package(COMPILER, _LazyCompiler)
    compiler = sys.modules[COMPILER]
    assert isinstance(compiler, _LazyCompiler)
    compiler._marks = _Marks(compiler)
    compiler.add_marks()
    # A version of torch may lack this module, or fail to import it: those that need it report that.
    with suppress(Exception), compiler.submodules_only():
        importlib.import_module(_FLEX_ATTENTION_PART)
