"""The token plans of diffusers' classes, a module for each family of classes, and the classes that no plan fits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Final

from xditd.gpu_workers.models.token_plans import TokenPlan

MODULES: Final = (
    "audio",
    "cog_view",
    "cross_attention_images",
    "flux",
    "flux3",
    "flux_relatives",
    "hidream",
    "hunyuan_image",
    "hunyuan_video",
    "joy_image",
    "krea2",
    "ltx",
    "lumina",
    "packed_images",
    "qwen_image",
    "sd3",
    "unsplit",
    "video",
    "wan",
)
"""Each has ``PLANS``: the plan of a class by its name, or the reason why there is none."""


NOT_WRITTEN: Final = "no token plan is written for this class"


@cache
def plans() -> Mapping[str, TokenPlan | str]:
    """Return what is known of all classes, by name."""
    found: dict[str, TokenPlan | str] = {}
    for name in MODULES:
        found.update(import_module(f"{__name__}.{name}").PLANS)
    return found


def find(class_name: str) -> TokenPlan | str:
    """Return the plan of a class, or the reason why it has none."""
    return plans().get(class_name, NOT_WRITTEN)
