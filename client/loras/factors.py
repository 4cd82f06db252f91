"""Prepare the factors of LoRA layers in a module to be lent, by the paths of their layers."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING

from xditd.client.lend_checks import check_manifest, state_of
from xditd.client.lending import Offer
from xditd.client.lent_memory import LentMemory
from xditd.client.lent_tensors import describe_tensors
from xditd.ipc.loras import LoraDescription, LoraLayer, LoraPart
from xditd.ipc.tensors import ComponentKind, Manifest

if TYPE_CHECKING:
    import torch


def describe_factors(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]], *, label: str, part: LoraPart, generation: int
) -> Offer:
    """Prepare ``down`` (rank, inputs), ``up`` (outputs, rank) and the scale of each layer, by path, as one LoRA.

    Memory that can be shared is not copied. Increase ``generation`` after writing to it.

    Raises:
        BadRequest, OutOfMemory: see :func:`xditd.client.lending.describe`.
    """
    memory = LentMemory()
    started = time.perf_counter()
    try:
        layers, tensors = [], {}
        for path, (down, up, scale) in factors.items():
            layer = LoraLayer(path.replace(".", "_"), part, f"{path}.lora_A.weight", f"{path}.lora_B.weight", scale)
            tensors[layer.down], tensors[layer.up] = down, up
            layers.append(layer)
        manifest = Manifest(
            kind=ComponentKind.LORA,
            label=label,
            tensors=tuple(describe_tensors(state_of(tensors), None, memory)),
            blocks=tuple(memory.blocks),
            lora=LoraDescription(layers=tuple(layers), as_class=True),
            generation=generation,
        )
        check_manifest(manifest)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # frames hold views, and an arena with views cannot be freed
        memory.close()
        raise
    return Offer(manifest, memory.copied, {"describe": (time.perf_counter() - started) * 1e3}, memory)
