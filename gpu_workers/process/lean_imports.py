"""Import the parts of xfuser that workers use, and of diffusers one class at a time.

``import xfuser`` imports every pipeline that it wraps, and through them most of diffusers, transformers and scipy: more
than half of what a rank took to start. Workers use its process groups, its attention backends and its USP. So packages
whose ``__init__`` imports what nobody asks for are deferred: their submodules can be imported without their own code.
The code of xfuser's packages never runs. That of scipy's runs when something asks for a name in them. Where something
asks for a class in diffusers' packages of models, only the module that defines it is imported. torch's compiler is
deferred, too (``lazy_compiler.py``).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from xditd.gpu_workers.process.class_packages import ClassPackage
from xditd.gpu_workers.process.lazy_compiler import defer_compiler
from xditd.gpu_workers.process.lazy_modules import LazyModule, SubmodulesOnly, defer_package
from xditd.gpu_workers.process.lazy_names import PlaceholderModule, with_placeholders

XFUSER_PACKAGES: Final = ("xfuser", "xfuser.model_executor", "xfuser.model_executor.layers")
CLASS_PACKAGES: Final = (
    "diffusers.models.autoencoders",
    "diffusers.models.controlnets",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
"""Packages whose own code only imports classes. Two of their modules import torchvision, and with it the compiler."""
LAZY_PACKAGES: Final = (
    "scipy.integrate",  # of diffusers' schedulers, for the coefficients of LMS alone
    "scipy.stats",  # likewise, for beta sigmas alone
)
RING_ATTENTION: Final = "torch.distributed.tensor.experimental._attention"
_LAZY_MODULES: Final = (RING_ATTENTION, "torch.distributed.fsdp", "torch.distributed.fsdp.wrap")
"""Modules whose functions xfuser calls for ring attention and for sharded models. They import the compiler."""
_XFUSER_PARTS: Final = (
    "xfuser.core.distributed",
    "xfuser.core.distributed.attention_backend",
    "xfuser.core.distributed.runtime_state",
    "xfuser.model_executor.layers.usp",
    "xfuser.config.args",
)


def defer_packages() -> None:
    """Put the packages into ``sys.modules`` whose code never runs, or only if it is needed.

    No package that was imported before is changed.
    """
    defer_compiler()  # before the others, whose parents import it
    for name in XFUSER_PACKAGES:
        defer_package(name, SubmodulesOnly)
    for name in CLASS_PACKAGES:
        defer_package(name, ClassPackage)
    for name in LAZY_PACKAGES:
        defer_package(name, LazyModule)


def run_deferred(module: ModuleType) -> None:
    """Run a module's own code, if it is a :class:`LazyModule` whose code has not run."""
    if isinstance(module, LazyModule):
        module.run_own_code()


def is_imported(name: str) -> bool:
    """Return whether a module is imported and its own code has run."""
    module = sys.modules.get(name)
    return module is not None and not isinstance(module, LazyModule)


def import_xfuser() -> None:
    """Import what workers use of xfuser, and quieten it. Does nothing where all of xfuser is imported already."""
    defer_packages()
    with _without_pipelines(), with_placeholders(_placeholders()):
        for name in _XFUSER_PARTS:
            importlib.import_module(name)
    # xfuser logs at DEBUG to stdout.
    xfuser_logging = importlib.import_module("xfuser.logger")
    xfuser_logging._default_handler.setStream(sys.stderr)
    xfuser_logging._default_handler.setLevel(logging.ERROR)


def leave_out_peft() -> None:
    """Let diffusers' models be imported, and run, without PEFT, which imports those of transformers.

    A rank has its own LoRAs. If a client's module has layers of PEFT, PEFT is imported to scale them.
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
    """Calls diffusers' function that scales PEFT's layers, unless the scale is 1.0.

    Every forward calls that function. It imports PEFT, for 0.7 s of the first job, also where it has nothing to scale.
    """

    def __init__(self, scale: Callable[..., None]) -> None:
        self._scale = scale

    def __call__(self, model: Any, weight: float | None = None) -> None:
        if weight is not None and weight != 1.0:
            self._scale(model, weight)


def _placeholders() -> Iterator[PlaceholderModule]:
    """Return placeholders for those of :data:`_LAZY_MODULES` that are not imported.

    One that this version of torch does not have gets none, so that its importer says so at once.
    """
    return (PlaceholderModule(name) for name in _LAZY_MODULES if name not in sys.modules and _has_file(name))


def _has_file(name: str) -> bool:
    """Return whether a module of an imported package is installed. ``find_spec`` would import its parents."""
    package, *inner = name.split(".")
    return any(
        Path(folder, *inner).is_dir() or Path(folder, *inner[:-1], f"{inner[-1]}.py").is_file()
        for folder in sys.modules[package].__path__
    )


@contextmanager
def _without_pipelines() -> Iterator[None]:
    """Replace diffusers' ``DiffusionPipeline`` by an empty class while other modules are imported.

    Its module imports all loaders, and xfuser names it in annotations alone.
    """
    diffusers = importlib.import_module("diffusers")
    if "DiffusionPipeline" in vars(diffusers):
        yield
        return
    vars(diffusers)["DiffusionPipeline"] = type("DiffusionPipeline", (), {"__module__": "diffusers"})
    try:
        yield
    finally:
        del vars(diffusers)["DiffusionPipeline"]
