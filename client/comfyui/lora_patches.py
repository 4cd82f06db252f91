"""Read ComfyUI's patches and bypassed adapters as LoRAs: two factors beside a layer, instead of a changed weight.

A patch is one if it adds the product of two factors to a weight, or to some of its rows, and changes nothing else.

Sources: ComfyUI 0.33, ``comfy/lora.py`` (``calculate_weight``), ``comfy/weight_adapter`` (``lora.py``, ``bypass.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from xditd.client.loras.lending import ReadLora
from xditd.ipc.limits import MAX_LORAS
from xditd.ipc.loras import FACTOR_DTYPES, MAX_SCALE, LoraLayer, LoraPart
from xditd.ipc.tensor_names import bare_name

if TYPE_CHECKING:
    import torch

Shape = Sequence[int]
Key = frozenset[tuple[Any, ...]]

_WEIGHT: Final = ".weight"
_ADAPTER: Final = ("comfy.weight_adapter.lora", "LoRAAdapter")
_MANAGER: Final = ("comfy.weight_adapter.bypass", "BypassInjectionManager")
_SWAP: Final = ("comfy.utils", "swap_scale_shift")
"""ComfyUI's function that swaps the halves of a difference: diffusers' ``norm_out`` has its rows in the other order."""


@dataclass(frozen=True, eq=False)
class Factors:
    """What one adapter adds to one layer: ``strength * scale * up @ down``.

    ``rows`` of ``up`` are added from the layer's output ``start`` on; without ``start`` they are all its outputs. All
    adapters of one load of a file have the same ``source``.
    """

    up: torch.Tensor
    down: torch.Tensor
    rows: tuple[int, int]
    scale: float
    start: int | None
    strength: float
    source: object

    def key(self, layer: str) -> tuple[Any, ...]:
        """Return what is equal for equal factors of a layer, as long as both have not been freed."""
        tensors = [(id(tensor), _writes(tensor)) for tensor in (self.up, self.down)]
        return layer, self.start, self.scale, self.rows, *tensors


@dataclass(frozen=True, eq=False)
class FoundLora:
    """A LoRA in a MODEL or CLIP: ``key`` is equal for equal ones; ``owned`` keeps the tensors of the key alive."""

    key: Key
    strength: float
    read: ReadLora
    owned: tuple[torch.Tensor, ...]


def read_patches(patches: Sequence[Any], shape: Shape) -> list[Factors] | None:
    """Return the factors of all patches of a weight of this shape; ``None`` if one of them is no LoRA."""
    found: list[Factors] = []
    for strength, value, strength_model, offset, function in patches:
        if strength_model != 1.0 or not _is(type(value), _ADAPTER):
            return None
        if any(each is not None for each in value.weights[4:]):
            return None  # DoRA, or a change of shape
        read = _read(value, strength, shape, offset)
        if function is not None and read is not None:
            read = _swapped(read, shape) if _is(function, _SWAP) and offset is None else None
        if read is None:
            return None
        found += read
    return found


def read_bypass(injections: Sequence[Any], shape_of: Callable[[str], Shape]) -> dict[str, list[Factors]] | None:
    """Return the factors that ComfyUI's bypass loaders add, by the names of the weights; ``None`` if it is not that.

    ComfyUI ignores the magnitudes of DoRA there, and changes of shape.
    """
    found: dict[str, list[Factors]] = {}
    for injection in injections:
        manager = _manager_of(injection.inject)
        if manager is None:
            return None
        for layer, (adapter, strength) in manager.adapters.items():
            name = layer + _WEIGHT
            read = _read(adapter, strength, shape_of(name), None) if _is(type(adapter), _ADAPTER) else None
            if read is None:
                return None
            found.setdefault(name, []).extend(read)
    return found


def find_loras(branches: Mapping[str, Sequence[Factors]], part: LoraPart) -> list[FoundLora]:
    """Join the factors of each load and strength to one LoRA; ``branches`` are theirs by the names of weights.

    If these are more than a job may name, strengths become parts of the scales, which makes them few.
    """
    found = _joined(branches, part)
    if len(found) > MAX_LORAS:
        found = _joined({name: list(map(_with_strength, each)) for name, each in branches.items()}, part)
    return found


def _joined(branches: Mapping[str, Sequence[Factors]], part: LoraPart) -> list[FoundLora]:
    groups: dict[tuple[Any, ...], dict[tuple[str, int | None], Factors]] = {}
    for name, factors in branches.items():
        for each in factors:
            number = 0
            while (name, each.start) in groups.setdefault((id(each.source), each.strength, number), {}):
                number += 1  # the same patch twice
            groups[id(each.source), each.strength, number][name, each.start] = each
    return [_found(group, strength, part) for (_, strength, _), group in groups.items() if group]


def _found(group: Mapping[tuple[str, int | None], Factors], strength: float, part: LoraPart) -> FoundLora:
    layers, factors = [], {}
    for (name, start), each in group.items():
        layer = name.removesuffix(_WEIGHT)
        at = layer if start is None else f"{layer}.{start}"
        down, up = f"{at}.lora_down.weight", f"{at}.lora_up.weight"
        first, last = each.rows
        factors[down], factors[up] = each.down.detach().flatten(1), each.up.detach().flatten(1)[first:last]
        layers.append(LoraLayer(bare_name(layer).replace(".", "_"), part, down, up, each.scale, start))
    return FoundLora(
        key=frozenset(each.key(name) for (name, _), each in group.items()),
        strength=strength,
        read=ReadLora(layers, factors),
        owned=tuple(tensor for each in group.values() for tensor in (each.up, each.down)),
    )


def _read(adapter: Any, strength: Any, shape: Shape, offset: Any) -> list[Factors] | None:
    """Return the factors of a LoRA for a weight of this shape, or ``None`` where ComfyUI does something else."""
    up, down, alpha, middle = adapter.weights[:4]
    if middle is not None or len(shape) != 2 or not _is_number(strength) or not (alpha is None or _is_number(alpha)):
        return None
    if offset is not None and (offset[0] != 0 or offset[1] < 0 or offset[1] + offset[2] > shape[0]):
        return None
    rows = shape[0] if offset is None else offset[2]
    if any(str(each.dtype).removeprefix("torch.") not in FACTOR_DTYPES or each.ndim < 2 for each in (up, down)):
        return None
    rank = down.shape[0]
    if not rank or (up.shape[0], math.prod(up.shape[1:]), math.prod(down.shape[1:])) != (rows, rank, shape[1]):
        return None
    scale = 1.0 if alpha is None else alpha / rank
    if abs(scale) > MAX_SCALE or abs(strength) > MAX_SCALE or abs(scale * strength) > MAX_SCALE:
        return None
    start = None if offset is None else int(offset[1])
    source = adapter.loaded_keys
    return [Factors(up, down, (0, rows), float(scale), start, float(strength), source)]


def _swapped(read: Sequence[Factors], shape: Shape) -> list[Factors] | None:
    half = shape[0] // 2
    if shape[0] % 2:
        return None
    return [
        replace(each, rows=rows, start=start)
        for each in read
        for rows, start in (((half, shape[0]), 0), ((0, half), half))
    ]


def _with_strength(each: Factors) -> Factors:
    return replace(each, scale=each.scale * each.strength, strength=1.0, source=None)


def _manager_of(inject: Any) -> Any:
    """Return the bypass manager whose function this is; ComfyUI keeps it in the function's closure alone."""
    return next((each for each in _closure(inject) if _is(type(each), _MANAGER)), None)


def _closure(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        yield cell.cell_contents


def _is(what: Any, name: tuple[str, str]) -> bool:
    return (getattr(what, "__module__", None), getattr(what, "__name__", None)) == name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _writes(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written in place, as far as torch knows."""
    return 0 if tensor.is_inference() else tensor._version
