"""Write the transformer of ``shapes`` in the packed formats in which people share FLUX.1.

    PYTHONPATH=tools:.pkg python -m shapes.packed models/shapes out/shapes                # all formats
    PYTHONPATH=tools:.pkg python -m shapes.packed models/shapes out/shapes --formats q8_0

Matrices of the blocks are packed, as published files do it; embedders, the last layer, norms and biases stay in
``--dtype``. The formats are those of ``docs/formats.md``: ``fp8`` (e4m3 with a scale a matrix) and ``int8`` (a scale a
row) with ComfyUI's markers in safetensors files, ``q8_0`` in a GGUF file.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from shapes.arguments import pipeline_folder
from shapes.models import weights_file
from xditd.client.demo.original_names import transformer_tensors

FORMATS: Final = ("fp8", "int8", "q8_0")
_BLOCKS: Final = ("double_blocks.", "single_blocks.")
_LARGEST_FP8: Final = 448.0
_SMALLEST: Final = 1e-12
"""Of the largest number of a matrix or row: zeros have a scale, too."""
_Q8_NUMBERS: Final = 32
_GGUF_ALIGNMENT: Final = 64
"""Ranks on the CPU copy tensors that do not start at a multiple of 64 bytes."""
_GGUF_TYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_GGUF_Q8_0: Final = 8

Tensors = Mapping[str, torch.Tensor]


def write_packed(folder: Path, out: Path, packed_format: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the transformer of a pipeline's folder in a format; return its file, ``out/flux1-shapes-FORMAT.*``.

    Raises:
        ValueError: the format is none of :data:`FORMATS`.
    """
    if packed_format not in FORMATS:
        raise ValueError(f"format {packed_format!r} is not known; use {', '.join(FORMATS)}")
    tensors = transformer_tensors(load_file(folder / "transformer" / weights_file("transformer")))
    out.mkdir(parents=True, exist_ok=True)
    if packed_format == "q8_0":
        path = out / "flux1-shapes-q8_0.gguf"
        path.write_bytes(_gguf(tensors, dtype))
        return path
    path = out / f"flux1-shapes-{packed_format}.safetensors"
    save_file(_marked(tensors, packed_format, dtype), path)
    path.chmod(0o644)
    return path


def is_packed(name: str, tensor: torch.Tensor) -> bool:
    """Tell whether a tensor of the original names is a matrix of a block."""
    return name.startswith(_BLOCKS) and name.endswith(".weight") and tensor.ndim == 2


def _marked(tensors: Tensors, packed_format: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    pack = _fp8 if packed_format == "fp8" else _int8
    written: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not is_packed(name, tensor):
            written[name] = tensor.to(dtype).contiguous()
            continue
        layer = name.removesuffix(".weight")
        written[name], written[f"{layer}.weight_scale"], marker = pack(tensor.float())
        written[f"{layer}.comfy_quant"] = torch.tensor([*json.dumps(marker).encode()], dtype=torch.uint8)
    return written


def _fp8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, object]]:
    scale = matrix.abs().max().clamp_min(_SMALLEST) / _LARGEST_FP8
    return (matrix / scale).to(torch.float8_e4m3fn), scale, {"format": "float8_e4m3fn"}


def _int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, object]]:
    scale = matrix.abs().amax(1).clamp_min(_SMALLEST) / 127
    values = (matrix / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return values, scale, {"format": "int8_tensorwise", "per_row": True}


def _q8_0(matrix: torch.Tensor) -> bytes:
    """Pack rows into blocks of 32 numbers: their scale in float16, then int8 values."""
    blocks = matrix.float().reshape(-1, _Q8_NUMBERS)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    values = torch.where(scale > 0, blocks / scale, 0.0).round().to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), values.view(torch.uint8)], 1).numpy().tobytes()


def _gguf(tensors: Tensors, dtype: torch.dtype) -> bytes:
    """Build a GGUF file of version 3; names, sides (innermost first), types and places come before the data.

    Source: ggml, ``docs/gguf.md``.
    """
    infos: list[bytes] = []
    data: list[bytes] = []
    end = 0
    for name, tensor in tensors.items():
        if is_packed(name, tensor):
            kind, raw = _GGUF_Q8_0, _q8_0(tensor)
        else:
            plain = tensor.to(dtype).contiguous()
            kind, raw = _GGUF_TYPES[dtype], plain.view(torch.uint8).numpy().tobytes()
        sides = tuple(reversed(tensor.shape))
        infos.append(_text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, end))
        data.append(raw + bytes(-len(raw) % _GGUF_ALIGNMENT))
        end += len(data[-1])
    pairs = [
        _text("general.architecture") + struct.pack("<I", 8) + _text("flux"),
        _text("general.alignment") + struct.pack("<II", 4, _GGUF_ALIGNMENT),
    ]
    head = b"".join([b"GGUF", struct.pack("<IQQ", 3, len(infos), len(pairs)), *pairs, *infos])
    return b"".join([head, bytes(-len(head) % _GGUF_ALIGNMENT), *data])


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the transformer of shapes in packed formats.")
    parser.add_argument("folder", type=pipeline_folder, help="the pipeline's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    given = parser.parse_args(arguments)
    for packed_format in given.formats:
        print(write_packed(given.folder, given.out, packed_format, getattr(torch, given.dtype)))


if __name__ == "__main__":
    main()
