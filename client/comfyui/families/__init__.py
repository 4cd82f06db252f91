"""The model families that the node pack can run: one module each, and nothing about any of them elsewhere in the pack.

Each module has an ``ADAPTER``, as ``adapter.Adapter`` describes it. To add a family, write its module and put its name
in :data:`MODULES`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from xditd.ipc.name_lists import listed

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter

MODULES: Final = ("flux1", "z_image")


def adapters() -> tuple[Adapter, ...]:
    """Return the adapter of each family, in the order of :data:`MODULES`; modules are imported when first asked for."""
    return tuple(importlib.import_module(f"{__name__}.{name}").ADAPTER for name in MODULES)


def adapter_of_model(model: Any) -> Adapter | None:
    """Find the family of a model of ComfyUI's (``comfy.model_base``); a subclass is another model."""
    return next((each for each in adapters() if type(model) in each.model_classes()), None)


def adapter_of_config(config: Any) -> Adapter | None:
    """Find the family of what ComfyUI detects in a file (``comfy.supported_models``)."""
    return next((each for each in adapters() if type(config) in each.config_classes()), None)


def titles() -> str:
    """Name the families for people."""
    return listed([each.title for each in adapters()], joint=" and ")


def search_words() -> list[str]:
    """Return what people may type to find a node that runs models: the families' titles up to their brackets."""
    return [each.title.partition(" (")[0].lower() for each in adapters()]
