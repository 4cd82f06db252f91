"""For tests: plain checkpoints packed as other programs pack them, and what their weights mean, by formulas of its own.

Nothing here is shared with the code under test: rotations come from digits of base 4, tiles from the place of each
scale, numbers of four bits from a table. Where comfy-kitchen can be imported, tests compare these with its code, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

State = dict[str, torch.Tensor]
GROUP = 64
FORMATS = ("float8", "float8_e5m2", "int8", "int8_rows", "int8_convrot", "mxfp8", "nvfp4", "old", "old_full", "plain")
"""``old`` and ``old_full`` are scaled fp8 with ``scale_weight``; in ``plain`` every tensor is cast to fp8."""


@dataclass
class Packed:
    """A packed checkpoint: its tensors and metadata, and the plain one that it means, in the compute dtype."""

    tensors: State = field(default_factory=dict)
    meant: State = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    """The names of the packed weights."""

    def save(self, path: Path) -> Path:
        from safetensors.torch import save_file

        save_file(self.tensors, path, metadata=self.metadata or None)
        return path


def pack(
    state: Mapping[str, torch.Tensor],
    format: str,
    dtype: torch.dtype,
    *,
    in_metadata: bool = False,
    prefix: str = "",
) -> Packed:
    """Pack every matrix of a checkpoint that the format can hold, and cast all other tensors to ``dtype``.

    ``in_metadata``: the formats of layers are in the header instead of in markers. ``prefix`` is that of the names.
    """
    found = Packed()
    layers: dict[str, Any] = {}
    for name, plain in state.items():
        layer = name.removesuffix(".weight")
        if format == "plain":
            found.tensors[name] = plain.to(torch.float8_e4m3fn)
            found.meant[name] = found.tensors[name].to(dtype)
            found.weights.append(name)
            continue
        made = _pack_matrix(plain, format, dtype) if plain.ndim == 2 and layer != name else None
        if made is None:
            found.tensors[name] = found.meant[name] = plain.to(dtype)
            continue
        parts, meant, marker = made
        found.tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        found.meant[name] = meant
        found.weights.append(name)
        if marker is not None:
            layers[layer] = marker
    if format in ("old", "old_full"):
        found.tensors[prefix + "scaled_fp8"] = torch.zeros(2 if format == "old_full" else 0, dtype=torch.float8_e4m3fn)
    elif in_metadata and layers:
        found.metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    else:
        for layer, marker in layers.items():
            found.tensors[f"{layer}.comfy_quant"] = torch.tensor([*json.dumps(marker).encode()], dtype=torch.uint8)
    return found


_Made = tuple[State, torch.Tensor, dict[str, Any] | None]


def _pack_matrix(plain: torch.Tensor, format: str, dtype: torch.dtype) -> _Made | None:
    columns = plain.shape[1]
    if format == "int8_convrot" and columns % GROUP:
        format = "int8_rows"  # as the programs that pack do
    if (format == "mxfp8" and columns % 32) or (format == "nvfp4" and columns % 16):
        return None
    return _PACKERS[format](plain, dtype)


def _float8(plain: torch.Tensor, dtype: torch.dtype) -> _Made:
    scale = plain.abs().max() / 448
    values = (plain / scale).to(torch.float8_e4m3fn)
    parts = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return parts, values.to(dtype) * scale.to(dtype), {"format": "float8_e4m3fn"}


def _float8_e5m2(plain: torch.Tensor, dtype: torch.dtype) -> _Made:
    scale = plain.abs().amax(dim=1, keepdim=True) / 57344
    values = (plain / scale).to(torch.float8_e5m2)
    marker = {"format": "float8_e5m2", "full_precision_matrix_mult": True}
    return {"weight": values, "weight_scale": scale}, values.to(dtype) * scale.to(dtype), marker


def _old(plain: torch.Tensor, dtype: torch.dtype) -> _Made:
    parts, meant, _ = _float8(plain, dtype)
    return {"weight": parts["weight"], "scale_weight": parts["weight_scale"], "scale_input": torch.ones(1)}, meant, None


def _int8(plain: torch.Tensor, dtype: torch.dtype) -> _Made:
    scale = (plain.abs().max() / 127).bfloat16()
    values = (plain / scale.float()).round().clamp(-128, 127).to(torch.int8)
    parts = {"weight": values, "weight_scale": scale}
    return parts, (values.float() * scale.float()).to(dtype), {"format": "int8_tensorwise"}


def _int8_rows(plain: torch.Tensor, dtype: torch.dtype) -> _Made:
    values, scale = _by_rows(plain)
    parts = {"weight": values, "weight_scale": scale[:, 0].clone()}
    return parts, (values.float() * scale).to(dtype), {"format": "int8_tensorwise", "per_row": True}


def _int8_convrot(plain: torch.Tensor, dtype: torch.dtype) -> _Made:
    rotation = rotation_of(GROUP)
    groups = (len(plain), -1, GROUP)
    values, scale = _by_rows((plain.reshape(groups) @ rotation).reshape(plain.shape))
    meant = ((values.float() * scale).reshape(groups) @ rotation).reshape(plain.shape)
    marker = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}
    return {"weight": values, "weight_scale": scale}, meant.to(dtype), marker


def _by_rows(plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = plain.abs().amax(dim=1, keepdim=True) / 127
    return (plain / scale).round().clamp(-128, 127).to(torch.int8), scale


def rotation_of(size: int) -> torch.Tensor:
    """Return the rotation of a group: an entry is negative for every digit of base 4 where both indices sum to 3."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    signs, place = torch.ones(size, size), 1
    while place < size:
        signs = torch.where((rows // place % 4) + (columns // place % 4) == 3, -signs, signs)
        place *= 4
    return signs / size**0.5


def _mxfp8(plain: torch.Tensor, dtype: torch.dtype) -> _Made:
    blocks = plain.reshape(len(plain), -1, 32)
    exponents = torch.ceil(torch.log2(blocks.abs().amax(dim=2) / 448)).clamp(min=-126)
    scale = torch.exp2(exponents).unsqueeze(2)
    values = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    meant = (values.float() * scale).reshape(plain.shape).to(dtype)
    tiles = tiled((exponents + 127).to(torch.uint8))
    return {"weight": values.reshape(plain.shape), "weight_scale": tiles}, meant, {"format": "mxfp8"}


def _nvfp4(plain: torch.Tensor, dtype: torch.dtype) -> _Made:
    whole = plain.abs().max() / (448 * 6)
    blocks = plain.reshape(len(plain), -1, 16)
    scale = (blocks.abs().amax(dim=2) / 6 / whole).clamp(max=448).to(torch.float8_e4m3fn)
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat([numbers, -numbers])
    wanted = blocks / (scale.float() * whole).clamp(min=1e-30).unsqueeze(2)
    bits = (wanted.unsqueeze(3) - numbers).abs().argmin(dim=3)
    meant = numbers.to(dtype)[bits] * (whole.to(dtype) * scale.to(dtype)).unsqueeze(2)
    pairs = bits.reshape(len(plain), -1, 2).to(torch.uint8)
    parts = {"weight": pairs[..., 0] * 16 + pairs[..., 1], "weight_scale": tiled(scale), "weight_scale_2": whole}
    return parts, meant.reshape(plain.shape), {"format": "nvfp4"}


def tiled(scales: torch.Tensor) -> torch.Tensor:
    """Put the scales of blocks, (rows, blocks of a row), where cuBLAS has them: in tiles of 128 rows and 4 columns."""
    rows, columns = scales.shape
    height, width = -(-rows // 128) * 128, -(-columns // 4) * 4
    flat = torch.zeros(height * width, dtype=torch.uint8)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = row // 128 * (width // 4) + column // 4
    flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = scales.contiguous().view(torch.uint8)
    return flat.reshape(height, width).view(scales.dtype)


_PACKERS: Mapping[str, Callable[[torch.Tensor, torch.dtype], _Made]] = {
    "float8": _float8,
    "float8_e5m2": _float8_e5m2,
    "old": _old,
    "old_full": _old,
    "int8": _int8,
    "int8_rows": _int8_rows,
    "int8_convrot": _int8_convrot,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
}
