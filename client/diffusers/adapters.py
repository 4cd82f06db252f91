"""The LoRA layers that PEFT has put into a module, as low-rank branches of the layers in them.

A module whose changes are such layers is lent without them, and its calls name the factors as lent LoRAs. What is no
product of two factors beside a plain linear layer (DoRA, LoKr, convolutions, biases, merged factors) is no branch: such
a module is lent with the layers of PEFT themselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from xditd.client.diffusers.shallow_record import Content, content_of
from xditd.ipc.loras import FACTOR_DTYPES, MAX_SCALE
from xditd.ipc.transports.module_walk import HOOKS, OWN

Scales = dict[str, dict[str, float]]
"""By adapter and path of a layer, the factor of ``up @ down`` in the next call."""

_PLAIN: Final = "peft.tuners.lora.layer"
_KNOWN: Final = frozenset(
    {
        "r",
        "lora_alpha",
        "scaling",
        "_disable_adapters",
        "merged_adapters",
        "use_dora",
        "use_rslora",
        "lora_bias",
        "_caches",
        "ephemeral_gpu_offload",
        "cast_input_dtype_enabled",
        "lora_variant",
        "kwargs",
        "in_features",
        "out_features",
        "fan_in_fan_out",
        "_active_adapter",
        "is_target_conv_1d_layer",
    }
)
"""The attributes of a layer of PEFT; one with others may compute something else."""

_KNOWN_OF_PARTS: Final = frozenset({"in_features", "out_features", "p", "inplace", "_keys"})
"""The attributes of the factors, of dropouts and of the containers of these."""

_EMPTY: Final = ("merged_adapters", "lora_variant", "_caches", "lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Adapters:
    """All LoRA layers of a module, by path, and what identifies the contents of their factors."""

    layers: Mapping[str, Any] = field(default_factory=dict)
    contents: Mapping[str, Mapping[str, tuple[Content, Content]]] = field(default_factory=dict)
    """By adapter and path: of ``down``, and of ``up``."""

    def scales(self) -> Scales | None:
        """Read the scales of the active adapters, those of 0 too; ``None`` if the layers are not as they were."""
        found: Scales = {}
        for path, layer in self.layers.items():
            if layer.merged_adapters:
                return None
            if layer._disable_adapters:
                continue
            for name in layer.active_adapters:
                if name not in layer.lora_A:
                    continue
                scale = layer.scaling[name]
                if type(scale) not in (float, int) or path not in self.contents.get(name, {}):
                    return None
                of_layer = found.setdefault(name, {})
                of_layer[path] = of_layer.get(path, 0.0) + scale  # an adapter may be active twice
        return found

    def factors(self, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the factors ``down`` and ``up`` of an adapter, by path: the module's own."""
        return {path: _factors(self.layers[path], name) for path in self.contents[name]}

    def first_scales(self, name: str) -> dict[str, float]:
        """Return the scales of an adapter at strength 1: alpha over rank, or over its root."""
        return {path: _first_scale(self.layers[path], name) for path in self.contents[name]}


NO_ADAPTERS: Final = Adapters()


def find_adapters(module: torch.nn.Module) -> Adapters:
    """Return the LoRA layers of a module, if all layers of PEFT in it can be branches; else none."""
    layers = {path: each for path, each in module.named_modules() if type(each).__module__.startswith("peft.")}
    if not layers or not all(map(_is_branch, layers.values())) or not _are_distinct(module, layers):
        return NO_ADAPTERS
    contents: dict[str, dict[str, tuple[Content, Content]]] = {}
    for path, layer in layers.items():
        for name in layer.lora_A:
            down, up = _factors(layer, name)
            contents.setdefault(name, {})[path] = content_of(down), content_of(up)
    return Adapters(layers, contents)


def _factors(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _first_scale(layer: Any, name: str) -> float:
    rank = layer.r[name]
    return float(layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name) else rank))


def _is_branch(layer: Any) -> bool:
    """Return whether a layer of PEFT only adds ``scale * up(down(x))`` to ``base(x)`` for each active adapter."""
    kind = type(layer)
    if (kind.__module__, kind.__qualname__) != (_PLAIN, "Linear"):
        return False
    base = layer.base_layer
    if not (
        type(base) is torch.nn.Linear
        and vars(layer).keys() <= OWN | _KNOWN
        and not any(getattr(layer, each) for each in _EMPTY)
        and not any(layer.lora_bias.values())
        and len(layer.lora_magnitude_vector) == 0
        and layer.cast_input_dtype_enabled
        and not layer.fan_in_fan_out
        and layer.quantization_backend is None
        and all(vars(each).keys() <= OWN | _KNOWN_OF_PARTS for each in _parts(layer))
        and not any(getattr(each, hooks) for each in (layer, *_parts(layer)) for hooks in HOOKS)
        and layer.lora_A.keys() == layer.lora_B.keys()
    ):
        return False
    return all(_is_plain_factor(layer, name) for name in layer.lora_A)


def _parts(layer: Any) -> Iterator[torch.nn.Module]:
    """Yield what PEFT has put into a layer."""
    for name, child in layer.named_children():
        if name != "base_layer":
            yield from child.modules()


def _is_plain_factor(layer: Any, name: str) -> bool:
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if any(type(each) is not torch.nn.Linear or each.bias is not None for each in (down, up)):
        return False
    drops = type(dropout) is not torch.nn.Identity and (type(dropout) is not torch.nn.Dropout or dropout.training)
    scales = (layer.scaling[name], _first_scale(layer, name))
    device = layer.base_layer.weight.device
    is_active = name in layer.active_adapters
    return not drops and (
        all(type(each) in (float, int) and math.isfinite(each) and abs(each) <= MAX_SCALE for each in scales)
        and down.weight.dtype == up.weight.dtype
        and str(down.weight.dtype).removeprefix("torch.") in FACTOR_DTYPES
        and all(type(each.weight) in (torch.nn.Parameter, torch.Tensor) for each in (down, up))
        and all(not each.weight.is_meta and each.weight.numel() > 0 for each in (down, up))
        # PEFT computes with those of inactive adapters on other devices once they are moved.
        and (not is_active or all(each.weight.device == device for each in (down, up)))
    )


def _are_distinct(module: torch.nn.Module, layers: Mapping[str, Any]) -> bool:
    """Return whether each layer is at one path, and no two paths are the same with ``_`` for dots, as in LoRAs."""
    places = Counter(id(each) for _, each in module.named_modules(remove_duplicate=False))
    flat = Counter(path.replace(".", "_") for path, _ in module.named_modules(remove_duplicate=False))
    return all(
        places[id(layer)] == places[id(layer.base_layer)] == 1 and flat[path.replace(".", "_")] == 1
        for path, layer in layers.items()
    )
