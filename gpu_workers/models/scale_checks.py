"""Check the scales of packed weights: numbers that are not finite would spoil a whole layer without an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch

from xditd.gpu_workers.packed.dequantise import untiled
from xditd.gpu_workers.packed.gguf_types import has_finite_scales
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.name_lists import listed
from xditd.ipc.packed import GGUF_BLOCKS, PackedWeight

_SOUND: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "mxfp8": lambda bits: bits != 0xFF,  # NaN of e8m0, which comfy-kitchen reads as infinity
    "nvfp4": lambda bits: (bits & 0x7F) != 0x7F,  # the only NaN of e4m3, with either sign
}
"""Which bytes of scales in tiles are numbers."""


def check_scales(packed: Iterable[PackedWeight], tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """Check the numbers in companions, and the scales in the blocks of GGUF's types, with one wait for the device.

    Raises:
        BadCheckpoint: a scale is not finite, or that of an input is not positive.
    """
    verdicts: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    of_inputs: set[str] = set()
    for weight in packed:
        if weight.format in GGUF_BLOCKS:
            verdicts[weight.weight] = has_finite_scales(tensors[weight.weight], weight.format)
        for field, name in weight.companions.items():
            if field == "scale" and weight.format in _SOUND:
                scales = untiled(PackedTensor.of(weight, tensors))  # not the padding of tiles, which nothing reads
                verdicts[name] = _SOUND[weight.format](scales.view(torch.uint8)).all()
            else:
                numbers[name] = tensors[name].reshape(-1).float()
                of_inputs.update([name] if field == "input_scale" else [])
    # All numbers at once: a model has a thousand tensors of them, and each by itself would be two launches.
    together = [*verdicts.values()]
    if numbers:
        together.append(torch.isfinite(torch.cat([*numbers.values()])).all())
    if of_inputs:
        together.append((torch.cat([numbers[name] for name in of_inputs]) > 0).all())
    if not together or bool(torch.stack(together).all()):
        return
    for name, values in numbers.items():
        verdicts[name] = (torch.isfinite(values) & ((values > 0) | (name not in of_inputs))).all()
    bad = [name for name, is_sound in verdicts.items() if not is_sound]
    raise BadCheckpoint(
        f"{label}: {len(bad)} scales of packed weights are not finite, or of an input not positive: {listed(bad)}; "
        "get the file again",
        names=bad,
    )
