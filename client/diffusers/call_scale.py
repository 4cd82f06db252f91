"""The scale of LoRA layers that a call gives: ``joint_attention_kwargs={"scale": 0.5}`` and the like.

Forwards of diffusers multiply the scales of PEFT's layers by it while they run. Workers have no such layers where the
adapters are branches, so the strengths of these are multiplied instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import FunctionType
from typing import Any, Final

import torch
from diffusers.utils import peft_utils

_SCALE: Final = "scale"
_SUFFIX: Final = "attention_kwargs"
_FREE: Final = "kwargs_name"


def has_scale(arguments: Mapping[str, Any]) -> bool:
    """Return whether arguments may have a scale of LoRA layers."""
    return any(
        name.endswith(_SUFFIX) and isinstance(value, Mapping) and _SCALE in value for name, value in arguments.items()
    )


def scale_of(kind: type, method: str, arguments: Mapping[str, Any]) -> float | None:
    """Return the scale by which a method multiplies those of the LoRA layers; ``None`` if that is not known.

    Source: diffusers, ``utils/peft_utils.py``, ``apply_lora_scale``.
    """
    if not has_scale(arguments):
        return 1.0
    name = _argument_with_scale(getattr(kind, method, None))
    given = None if name is None else arguments.get(name)
    if not isinstance(given, Mapping) or sum(has_scale({each: arguments[each]}) for each in arguments) != 1:
        return None
    scale = given.get(_SCALE)
    return float(scale) if isinstance(scale, (float, int)) and math.isfinite(scale) else None


def finish(module: torch.nn.Module, scale: float) -> None:
    """Do to the LoRA layers what the forward does at its end: after a scale of 0, it resets all scales to alpha / rank.

    Source: diffusers, ``utils/peft_utils.py``, ``unscale_lora_layers``.
    """
    if scale == 0.0:
        peft_utils.unscale_lora_layers(module, scale)


def _argument_with_scale(function: Any) -> str | None:
    """Return the argument whose scale the decorator of diffusers applies; ``None`` without that decorator."""
    while isinstance(function, FunctionType):
        code = function.__code__
        if code.co_filename == peft_utils.__file__ and _FREE in code.co_freevars and function.__closure__:
            name = function.__closure__[code.co_freevars.index(_FREE)].cell_contents
            return name if isinstance(name, str) else None
        function = vars(function).get("__wrapped__")
    return None
