"""For tests: GGUF files of any content, sound or not, and packed weights with seeded bits."""

from __future__ import annotations

import ctypes
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from xditd.ipc.packed import GGUF_BLOCKS

KINDS = {
    "float32": 0,
    "float16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq4_nl": 20,
    "iq4_xs": 23,
    "bfloat16": 30,
}
"""The numbers of types in a file."""

SCALES: Mapping[str, tuple[int, ...]] = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
}
"""Where a block has its float16 scale, and that of its offsets."""
_OFFSETS = {"q4_1": -7.5, "q5_1": -15.5, "q2_k": 1.5, "q4_k": 7.5, "q5_k": 15.5}
"""The scale of offsets, in scales of numbers, with which random numbers have a mean of about 0."""
_SPREADS = {
    "q8_0": 74.0,
    "q4_0": 4.6,
    "q4_1": 4.6,
    "q5_0": 9.2,
    "q5_1": 9.2,
    "q2_k": 16.0,
    "q3_k": 42.0,
    "q4_k": 230.0,
    "q5_k": 460.0,
    "q6_k": 1370.0,
    "iq4_nl": 67.0,
    "iq4_xs": 1240.0,
}
"""The standard deviation of random numbers with a scale of 1."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file. ``sides`` begins with the innermost dimension; ``offset`` is set where a test lies."""

    name: str
    kind: int
    sides: Sequence[int]
    data: bytes
    offset: int | None = None


def text(value: str | bytes) -> bytes:
    """Encode a string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def string_pair(key: str | bytes, value: str) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(value)


def number_pair(key: str, value: int, kind: int = 4, code: str = "I") -> bytes:
    return text(key) + struct.pack(f"<I{code}", kind, value)


def array_pair(key: str, kind: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    return text(key) + struct.pack("<I", 9) + array(kind, items, count)


def array(kind: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    """Encode an array without its key and type, as it lies in another array."""
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


def original_shape(name: str, shape: Iterable[int]) -> bytes:
    return array_pair(f"comfy.gguf.orig_shape.{name}", 5, [struct.pack("<i", side) for side in shape])


def gguf_bytes(
    tensors: Sequence[GgufTensor],
    pairs: Sequence[bytes] = (),
    *,
    alignment: int = 32,
    version: int = 3,
    tensor_count: int | None = None,
    pair_count: int | None = None,
) -> bytes:
    """Return a whole file. A test that gives another ``alignment`` gives its pair, too."""
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    infos, data, end = [], [], 0
    for tensor in tensors:
        sides = struct.pack(f"<I{len(tensor.sides)}Q", len(tensor.sides), *tensor.sides)
        place = struct.pack("<IQ", tensor.kind, end if tensor.offset is None else tensor.offset)
        infos.append(text(tensor.name) + sides + place)
        data.append(tensor.data + bytes(-len(tensor.data) % alignment))
        end += len(data[-1])
    start = b"".join([head, *pairs, *infos])
    return b"".join([start, bytes(-len(start) % alignment), *data])


def random_blocks(kind: str, rows: int, columns: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    """Make a packed weight of random bits: uint8 (rows, bytes of a row), its numbers about 0 with this spread."""
    block = GGUF_BLOCKS[kind]
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns // block.numbers
    blocks = torch.randint(0, 256, (count, block.size_bytes), dtype=torch.uint8, generator=generator)
    scale = (0.75 + 0.5 * torch.rand(count, 1, generator=generator)) * spread / _SPREADS[kind]
    for at, factor in zip(SCALES[kind], (1.0, _OFFSETS.get(kind)), strict=False):
        assert factor is not None
        blocks[:, at : at + 2] = (scale * factor).half().view(torch.uint8)
    return blocks.view(rows, -1)


def hostile_blocks(kind: str, count: int, seed: int) -> torch.Tensor:
    """Make blocks of random bits, one in each row, with scales of any finite bit pattern."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, GGUF_BLOCKS[kind].size_bytes), dtype=torch.uint8, generator=generator)
    for at in SCALES[kind]:
        high = blocks[:, at + 1]
        blocks[:, at + 1] = torch.where((high & 0x7C) == 0x7C, high & 0xBF, high)
    return blocks


def bytes_of(tensor: torch.Tensor) -> bytes:
    whole = tensor.contiguous()
    return ctypes.string_at(whole.data_ptr(), whole.nbytes)


def plain_tensor(name: str, tensor: torch.Tensor) -> GgufTensor:
    kind = KINDS[str(tensor.dtype).removeprefix("torch.")]
    return GgufTensor(name, kind, tuple(reversed(tensor.shape)), bytes_of(tensor))


def packed_tensor(name: str, kind: str, blocks: torch.Tensor, columns: int) -> GgufTensor:
    return GgufTensor(name, KINDS[kind], (columns, blocks.shape[0]), bytes_of(blocks))


def write_model(
    path: Path,
    state: Mapping[str, torch.Tensor],
    kind_of: Callable[[str], str | None],
    architecture: str,
    *,
    alignment: int = 32,
) -> dict[str, tuple[str, torch.Tensor]]:
    """Write a checkpoint with packed weights; return these by name, each with its type.

    ``kind_of`` returns the type of a matrix, or ``None`` if it stays as it is. Packed weights have seeded bits, and
    numbers as large as those of a linear layer: to pack the given ones would need each type's quantiser.
    """
    tensors, packed = [], {}
    for name, tensor in state.items():
        kind = kind_of(name) if tensor.ndim == 2 else None
        if kind is None or tensor.shape[1] % GGUF_BLOCKS[kind].numbers:
            tensors.append(plain_tensor(name, tensor))
            continue
        rows, columns = tensor.shape
        blocks = random_blocks(kind, rows, columns, zlib.crc32(name.encode()), 1 / math.sqrt(columns))
        packed[name] = (kind, blocks)
        tensors.append(packed_tensor(name, kind, blocks, columns))
    pairs = [string_pair("general.architecture", architecture), number_pair("general.alignment", alignment)]
    path.write_bytes(gguf_bytes(tensors, pairs, alignment=alignment))
    return packed


def dequantise(blocks: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Return what the workers make of blocks, uint8 (rows, bytes of a row), as (rows, columns)."""
    from xditd.gpu_workers.packed.gguf_types import dequantise_into

    block = GGUF_BLOCKS[kind]
    rows, row_bytes = blocks.shape
    out = torch.empty(rows, row_bytes // block.size_bytes * block.numbers, dtype=dtype, device=blocks.device)
    dequantise_into(blocks, kind, out)
    return out


LLAMA_CPP = {
    "shared.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    "encoder.block.": "enc.blk.",
    ".layer.0.SelfAttention.relative_attention_bias.": ".attn_rel_b.",
    ".layer.0.SelfAttention.": ".attn_",
    ".layer.0.layer_norm.": ".attn_norm.",
    ".layer.1.DenseReluDense.wi_0.": ".ffn_gate.",
    ".layer.1.DenseReluDense.wi_1.": ".ffn_up.",
    ".layer.1.DenseReluDense.wo.": ".ffn_down.",
    ".layer.1.layer_norm.": ".ffn_norm.",
}
"""Parts of T5's names, and llama.cpp's, in the order in which they are replaced."""


def write_t5(path: Path, state: Mapping[str, torch.Tensor], kind: str) -> dict[str, tuple[str, torch.Tensor]]:
    """Write a T5 as llama.cpp's tools do; return its packed weights by their names in ``state``, as ``write_model``."""
    spelled = {}
    for name in state:
        spelled[name] = name
        for part, theirs in LLAMA_CPP.items():
            spelled[name] = spelled[name].replace(part, theirs)
    named = {spelled[name]: tensor for name, tensor in state.items()}
    packed = write_model(path, named, lambda name: None if "attn_rel_b" in name else kind, "t5encoder")
    return {name: packed[theirs] for name, theirs in spelled.items() if theirs in packed}
