"""Prepare the factors of LoRA layers in a module to be lent, by the paths of their layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from xditd.client.lend_checks import state_of
from xditd.client.lending import Offer
from xditd.client.loras.lending import ReadLora, describe_lora
from xditd.ipc.loras import LoraLayer, LoraPart

if TYPE_CHECKING:
    import torch


def describe_factors(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]], *, label: str, part: LoraPart, generation: int
) -> Offer:
    """Prepare ``down`` (rank, inputs), ``up`` (outputs, rank) and the scale of each layer, by path, as one LoRA.

    Memory that can be shared is not copied. Increase ``generation`` after writing to it.

    Raises:
        BadCheckpoint, BadRequest, OutOfMemory: see :func:`xditd.client.loras.lending.describe_lora`.
    """
    layers: list[LoraLayer] = []
    tensors: dict[str, torch.Tensor] = {}
    for path, (down, up, scale) in factors.items():
        layer = LoraLayer(path.replace(".", "_"), part, f"{path}.lora_A.weight", f"{path}.lora_B.weight", scale)
        tensors[layer.down], tensors[layer.up] = down, up
        layers.append(layer)
    return describe_lora(ReadLora(layers, state_of(tensors)), label=label, generation=generation, as_class=True)
