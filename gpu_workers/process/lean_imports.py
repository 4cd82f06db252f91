"""Import the parts of xfuser that workers use, and of diffusers one class at a time.

``import xfuser`` imports every pipeline that it wraps, and through them most of diffusers, transformers and scipy: more
than half of what a rank took to start. Workers use its process groups, its attention backends and its USP. So packages
whose ``__init__`` imports what nobody asks for stay deferred: their submodules can be imported, their own code does not
run. That of diffusers and of ``scipy.stats`` runs when something asks for a name in it; that of xfuser never does.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

XFUSER_PACKAGES: Final = ("xfuser", "xfuser.model_executor", "xfuser.model_executor.layers")
ON_DEMAND_PACKAGES: Final = (
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "scipy.integrate",  # of diffusers' schedulers, for the coefficients of LMS alone
    "scipy.stats",  # likewise, for beta sigmas alone
)
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
        with self._lock:
            if self.__class__ is _OnDemand and not self._is_running:
                self._is_running = True
                assert self.__spec__ is not None
                assert self.__spec__.loader is not None
                try:
                    self.__spec__.loader.exec_module(self)
                    self.__class__ = ModuleType  # type: ignore[assignment]
                finally:
                    self._is_running = False
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


def defer_packages() -> None:
    """Put the packages in place whose code runs never, or on demand. No package that was imported before is changed."""
    for name in XFUSER_PACKAGES:
        _defer(name, _Never)
    for name in ON_DEMAND_PACKAGES:
        _defer(name, _OnDemand)


def import_xfuser() -> None:
    """Import what workers use of xfuser, and quieten it. Does nothing where all of xfuser is imported already."""
    defer_packages()
    with _without_pipelines():
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
