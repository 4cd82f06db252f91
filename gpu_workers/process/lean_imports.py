"""Import the parts of xfuser that workers use, and of diffusers one class at a time.

``import xfuser`` imports every pipeline that it wraps, and through them most of diffusers, transformers and scipy: more
than half of what a rank took to start. Workers use its process groups, its attention backends and its USP. So packages
whose ``__init__`` imports what nobody asks for stay deferred: their submodules can be imported, their own code does not
run. That of diffusers and of ``scipy.stats`` runs when something asks for a name in it; that of xfuser never does.

torch's compiler is three quarters of what diffusers' base takes to import, to mark a few classes for it. Its code runs
when something else of it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

from xditd.gpu_workers.process.late_names import LateModule, in_place

XFUSER_PACKAGES: Final = ("xfuser", "xfuser.model_executor", "xfuser.model_executor.layers")
ON_DEMAND_PACKAGES: Final = (
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "scipy.integrate",  # of diffusers' schedulers, for the coefficients of LMS alone
    "scipy.stats",  # likewise, for beta sigmas alone
)
COMPILER: Final = "torch._dynamo"
"""torch's compiler."""
_OF_FLEX_ATTENTION: Final = f"{COMPILER}._trace_wrapped_higher_order_op"
"""The module of the compiler that flex attention imports, and with it transformers."""
_IMPORTLIB: Final = importlib._bootstrap._find_and_load.__code__.co_filename  # type: ignore[attr-defined]
RING_ATTENTION: Final = "torch.distributed.tensor.experimental._attention"
_LATE_MODULES: Final = (RING_ATTENTION, "torch.distributed.fsdp", "torch.distributed.fsdp.wrap")
"""Those whose functions xfuser calls for ring attention, and for shards of models. They import the compiler."""
_XFUSER_PARTS: Final = (
    "xfuser.core.distributed",
    "xfuser.core.distributed.attention_backend",
    "xfuser.core.distributed.runtime_state",
    "xfuser.model_executor.layers.usp",
    "xfuser.config.args",
)


class _Deferred(ModuleType):
    """A package whose own code has not run."""

    _lock: threading.RLock
    _is_running: bool


class _Never(_Deferred):
    """One whose code does not run at all."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__}.{name}: workers import the modules of {self.__name__} one by one")


class _OnDemand(_Deferred):
    """One whose code runs when a name is asked for that is no submodule imported so far."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for in any package
            raise AttributeError(name)
        self.run()
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None

    def run(self) -> None:
        with self._lock:
            if isinstance(self, _OnDemand) and not self._is_running:  # another thread may have run it meanwhile
                self._is_running = True
                self._begin()
                assert self.__spec__ is not None
                assert self.__spec__.loader is not None
                try:
                    self.__spec__.loader.exec_module(self)
                    self.__class__ = ModuleType  # type: ignore[assignment]
                except BaseException:
                    self._end_failed()
                    raise
                finally:
                    self._is_running = False

    def _begin(self) -> None:
        """Called before the code runs."""

    def _end_failed(self) -> None:
        """Called if the code raises. It runs again when a name is asked for, and raises again."""


class _Compiler(_OnDemand):
    """torch's compiler for modules that mark functions and classes for it, which stay as they are.

    The marks change nothing but what ``torch.compile`` does with what is marked; workers record blocks by torch's
    dispatch instead. The code runs when another name, or one of its modules, is asked for.
    """

    def add_marks(self) -> None:
        """Add the names that may be asked for before the code runs."""
        self.allow_in_graph = self.assume_constant_result = _unmarked
        self.disable = lambda fn=None, *_, **__: _unmarked if fn is None else fn
        # init_process_group lets the compiler forget what it knows.
        self.trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)

    def _begin(self) -> None:
        for name in ("allow_in_graph", "assume_constant_result", "disable", "trace_rules"):
            self.__dict__.pop(name, None)

    def _end_failed(self) -> None:
        self.add_marks()  # what only marks things goes on without the compiler

    def import_alone(self, name: str) -> None:
        """Import one of its modules, without the package's own code."""
        self._is_running = True
        with suppress(ModuleNotFoundError):  # another version without it
            importlib.import_module(name)
        self._is_running = False

    @property
    def __path__(self) -> Any:
        """Where its modules lie. When one is imported, the package's own code runs before, as ever.

        ``from torch._dynamo import NAME`` looks for a path, too, but not from importlib's own code.
        """
        if sys._getframe(1).f_code.co_filename == _IMPORTLIB:
            try:
                self.run()
            except AttributeError as error:  # of a property, Python would take it for no attribute: "is not a package"
                raise ImportError(f"{self.__name__} cannot be imported: AttributeError: {error}") from error
        return self.__dict__["__path__"]

    @__path__.setter
    def __path__(self, found: Any) -> None:
        self.__dict__["__path__"] = found


def _unmarked(fn: Any) -> Any:  # the compiler's name for it: some give it by name
    return fn


def defer_packages() -> None:
    """Put the packages in place whose code runs never, or on demand. No package that was imported before is changed."""
    if COMPILER not in sys.modules:  # before the others, whose parents import it
        _defer(COMPILER, _Compiler)
        compiler = sys.modules[COMPILER]
        assert isinstance(compiler, _Compiler)
        compiler.import_alone(_OF_FLEX_ATTENTION)
        compiler.add_marks()
    for name in XFUSER_PACKAGES:
        _defer(name, _Never)
    for name in ON_DEMAND_PACKAGES:
        _defer(name, _OnDemand)


def run_deferred(package: ModuleType) -> None:
    """Run a package's own code, if it was deferred until a name is asked for."""
    if isinstance(package, _OnDemand):
        package.run()


def import_xfuser() -> None:
    """Import what workers use of xfuser, and quieten it. Does nothing where all of xfuser is imported already."""
    defer_packages()
    with _without_pipelines(), in_place(_late_modules()):
        for name in _XFUSER_PARTS:
            importlib.import_module(name)
    # xfuser logs at DEBUG to stdout.
    xfuser_logging = importlib.import_module("xfuser.logger")
    xfuser_logging._default_handler.setStream(sys.stderr)
    xfuser_logging._default_handler.setLevel(logging.ERROR)


def leave_out_peft() -> None:
    """Let diffusers' models be imported, and run, without PEFT, which imports those of transformers.

    A rank has its own LoRAs. PEFT's layers in a client's module are scaled by it as before: it is imported for them.
    """
    defer_packages()
    vars(importlib.import_module("diffusers.utils.import_utils"))["_peft_available"] = False
    utils, functions = importlib.import_module("diffusers.utils"), importlib.import_module("diffusers.utils.peft_utils")
    for name in ("scale_lora_layers", "unscale_lora_layers"):
        scale = getattr(functions, name, None)
        if scale is not None and not isinstance(scale, _ScaleUnlessOne):
            for module in (functions, utils):
                setattr(module, name, _ScaleUnlessOne(scale))


class _ScaleUnlessOne:
    """diffusers' functions that scale PEFT's layers, called by every forward: with a scale of 1.0 they do nothing, but
    import PEFT before, for 0.7 s of the first job."""

    def __init__(self, scale: Callable[..., None]) -> None:
        self._scale = scale

    def __call__(self, model: Any, weight: float | None = None) -> None:
        if weight is not None and weight != 1.0:
            self._scale(model, weight)


def _defer(name: str, kind: type[_Deferred]) -> None:
    """Put a package in place without running its code, unless it was imported before."""
    if name in sys.modules:
        return
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent is not installed
        return
    if spec is None or spec.submodule_search_locations is None:
        return  # another version without this package: its importers say so
    package = kind(name)
    package.__spec__, package.__file__ = spec, spec.origin
    package.__path__ = list(spec.submodule_search_locations)
    package.__package__ = name
    package._lock, package._is_running = threading.RLock(), False
    sys.modules[name] = package
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, package)


def _late_modules() -> Iterator[LateModule]:
    """Return what stands for those of :data:`_LATE_MODULES` that are not imported.

    One that this version of torch does not have stays out, so that its importer says so at once.
    """
    return (LateModule(name) for name in _LATE_MODULES if name not in sys.modules and _has_file(name))


def _has_file(name: str) -> bool:
    """Return whether a module of an imported package is installed. ``find_spec`` would import its parents."""
    package, *inner = name.split(".")
    return any(
        Path(folder, *inner).is_dir() or Path(folder, *inner[:-1], f"{inner[-1]}.py").is_file()
        for folder in sys.modules[package].__path__
    )


@contextmanager
def _without_pipelines() -> Iterator[None]:
    """Give modules that are imported within a class in place of diffusers' ``DiffusionPipeline``, whose module imports
    all loaders: xfuser names it in annotations alone."""
    diffusers = importlib.import_module("diffusers")
    if "DiffusionPipeline" in vars(diffusers):
        yield
        return
    vars(diffusers)["DiffusionPipeline"] = type("DiffusionPipeline", (), {"__module__": "diffusers"})
    try:
        yield
    finally:
        del vars(diffusers)["DiffusionPipeline"]
