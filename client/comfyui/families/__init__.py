"""Registry of the model families that the node pack runs; one module each knows all about its family.

Each module has an ``ADAPTER`` (see ``adapter.Adapter``). To add a family, write its module and add its name to
:data:`MODULES`. Its text encoders are in a module of their own with a ``TEXT_ADAPTER`` (see
``text_adapter.TextAdapter``), whose name is in :data:`TEXT_MODULES`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from xditd.ipc.name_lists import listed

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Adapter
    from xditd.client.comfyui.families.text_adapter import TextAdapter

MODULES: Final = ("flux1", "flux2", "z_image", "qwen_image", "wan")
TEXT_MODULES: Final = ("flux1_text", "flux2_text", "z_image_text", "qwen_image_text", "wan_text")


def adapters() -> tuple[Adapter, ...]:
    """Return the adapter of each family, in the order of :data:`MODULES`; imports the modules."""
    return tuple(importlib.import_module(f"{__name__}.{name}").ADAPTER for name in MODULES)


def adapter_of_model(model: Any) -> Adapter | None:
    """Find the family of a ComfyUI model by its class in ``comfy.model_base``; a subclass does not count."""
    return next((each for each in adapters() if type(model) in each.model_classes()), None)


def adapter_of_config(config: Any) -> Adapter | None:
    """Find the family of a configuration that ComfyUI detected in a file (``comfy.supported_models``)."""
    return next((each for each in adapters() if type(config) in each.config_classes()), None)


def titles() -> str:
    """Return the families' titles as one text for users."""
    return listed([each.title for each in adapters()], joint=" and ")


def search_words() -> list[str]:
    """Return words for ComfyUI's node search: the families' titles up to their brackets."""
    return [each.title.partition(" (")[0].lower() for each in adapters()]


def text_adapters() -> dict[str, TextAdapter]:
    """Return the adapters of text encoders by their types, in the order of :data:`TEXT_MODULES`."""
    found = (importlib.import_module(f"{__name__}.{name}").TEXT_ADAPTER for name in TEXT_MODULES)
    return {each.clip_type: each for each in found}
