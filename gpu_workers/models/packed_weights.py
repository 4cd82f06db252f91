"""The packed weights of a component: which layers multiply them packed and how, and which are dequantised once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from xditd.gpu_workers.models.entries import Slice
from xditd.gpu_workers.packed.embedding import can_look_up
from xditd.gpu_workers.packed.linear import is_linear_weight
from xditd.gpu_workers.packed.native_products import memory_fault
from xditd.gpu_workers.packed.product_choice import Decision, ProductChoice
from xditd.gpu_workers.packed.product_times import ProductKind
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.packed.triton_dequantise import dequantise_fastest
from xditd.ipc.packed import PackedWeight


def linear_targets(
    module: torch.nn.Module, key_map: Mapping[str, Slice], packed: Mapping[str, PackedWeight]
) -> list[str]:
    """Return the parameters whose layers multiply packed weights: of each source all, or none.

    All others are dequantised once: norms, biases, embeddings, convolutions, and what a module uses in its own way.
    """
    apart = {
        part.source
        for target, part in key_map.items()
        if part.source in packed and not is_linear_weight(module, target)
    }
    return [target for target, part in key_map.items() if part.source in packed and part.source not in apart]


def embedding_targets(
    module: torch.nn.Module, key_map: Mapping[str, Slice], packed: Mapping[str, PackedWeight]
) -> list[str]:
    """Return the parameters that are whole packed tables, of which a layer looks up rows."""
    return [
        target
        for target, part in key_map.items()
        if part.source in packed
        and packed[part.source].shape[0] == part.stop - part.start
        and can_look_up(module, target, packed[part.source].format)
    ]


def dequantise_once(
    packed: Iterable[PackedWeight], tensors: dict[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]
) -> list[torch.Tensor]:
    """Replace these packed weights among ``tensors`` by dequantised ones, and remove their companions.

    ``dtypes`` are those of the dequantised weights, by their names among ``tensors``. Returns the new tensors, whose
    memory is this rank's own.

    Raises:
        torch.OutOfMemoryError: the device has too little memory.
    """
    made = []
    for each in packed:
        found = PackedTensor.of(each, tensors)
        out = torch.empty(each.shape, dtype=dtypes[each.weight], device=found.values.device)
        made.append(dequantise_fastest(found, out))
        for name in each.companions.values():
            del tensors[name]
        tensors[each.weight] = made[-1]
    return made


def choose_products(
    choice: ProductChoice,
    dtypes: Mapping[str, torch.dtype],
    packed: Mapping[str, PackedTensor],
) -> dict[str, Decision]:
    """Choose the products of whole packed weights with their compute dtypes, on all ranks alike."""
    found: dict[str, Decision] = {}
    for name, weight in packed.items():
        kind = ProductKind.of(weight.as_matrix(), dtypes[name])
        found[name] = choice.choose([kind])[kind]
    return found


def packed_view(weight: PackedWeight, tensors: Mapping[str, torch.Tensor], decision: Decision | None) -> PackedTensor:
    """View a packed weight among ``tensors``, with the product that was chosen for it, if its memory allows that."""
    packed = PackedTensor.of(weight, tensors)
    if decision is None:
        return packed
    if decision.product == "reference":
        return replace(packed, why_not_native=decision.reason)
    native = decision.function_for(packed)
    why = (memory_fault(packed.values) or "") if native is None else ""
    return replace(packed, native=native, why_not_native=why)
