"""Packed weights: sizes of blocks as ``gguf`` has them, and every fault of a weight and its companions named."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest

from xditd.ipc.packed import (
    GGUF_BLOCKS,
    MAX_GROUP,
    PackedFormat,
    PackedWeight,
    packed_faults,
    stored_shape,
    weight_faults,
)
from xditd.ipc.tensors import Fingerprint, HostShmBlock, Manifest, TensorSpec


@dataclass(frozen=True)
class Info:
    dtype: str
    shape: tuple[int, ...]


SCALE = {"w.s": Info("float32", (256, 1))}
ONE = Info("float32", ())
SOUND: list[tuple[PackedWeight, dict[str, Info]]] = [
    (PackedWeight("w", "float8", (7,)), {"w": Info("float8_e5m2", (7,))}),
    (PackedWeight("w", "float8", ()), {"w": Info("float8_e5m2", ())}),
    (PackedWeight("w", "float8", (4, 3, 2, 2)), {"w": Info("float8_e4m3fn", (4, 3, 2, 2))}),
    (
        PackedWeight("w", "float8", (256, 5), scale="w.s", input_scale="w.i"),
        {"w": Info("float8_e4m3fn", (256, 5)), "w.s": Info("bfloat16", (1,)), "w.i": ONE},
    ),
    (PackedWeight("w", "int8", (256, 5), scale="w.s"), {"w": Info("int8", (256, 5)), "w.s": ONE}),
    (PackedWeight("w", "int8_convrot", (256, 64), scale="w.s", group=16), {"w": Info("int8", (256, 64)), **SCALE}),
    (
        PackedWeight("w", "mxfp8", (200, 96), scale="w.s"),
        {"w": Info("float8_e4m3fn", (200, 96)), "w.s": Info("uint8", (256, 4))},
    ),
    (
        PackedWeight("w", "nvfp4", (128, 80), scale="w.s", scale_2="w.t", input_scale="w.i"),
        {"w": Info("uint8", (128, 40)), "w.s": Info("float8_e4m3fn", (128, 8)), "w.t": ONE, "w.i": ONE},
    ),
    (PackedWeight("w", "q4_k", (3, 512)), {"w": Info("uint8", (3, 288))}),
    (PackedWeight("w", "q8_0", (3, 8, 2, 2)), {"w": Info("uint8", (3, 34))}),
]


@pytest.mark.parametrize(("packed", "tensors"), SOUND, ids=lambda value: getattr(value, "format", ""))
def test_sound_weights_have_no_faults(packed: PackedWeight, tensors: dict[str, Info]) -> None:
    assert weight_faults(packed, tensors) == []


CONVROT = PackedWeight("w", "int8_convrot", (256, 64), scale="w.s", group=16)
INT8: dict[str, Info] = {"w": Info("int8", (256, 64)), **SCALE}
MXFP8 = PackedWeight("w", "mxfp8", (200, 96), scale="w.s")


@pytest.mark.parametrize(
    ("packed", "tensors", "says"),
    [
        (CONVROT, {"w": INT8["w"]}, "needs tensor w.s, which is missing"),
        (PackedWeight("w", "int8", (256, 64)), INT8, "has no scale"),
        (CONVROT, INT8 | {"w": Info("uint8", (256, 64))}, "is uint8: it has to be int8"),
        (CONVROT, INT8 | {"w": Info("int8", (256, 32))}, "the shape [256, 64] takes [256, 64] of int8"),
        (CONVROT, INT8 | {"w.s": Info("float32", (64, 1))}, "of shape [64, 1]: it has to be [] or [256, 1]"),
        (CONVROT, INT8 | {"w.s": Info("float64", (256, 1))}, "in float64: it has to be float32"),
        (PackedWeight("w", "int8_convrot", (256, 64), "w.s"), INT8, "groups of 0: a group is a power of 4"),
        (PackedWeight("w", "int8_convrot", (256, 64), "w.s", group=32), INT8, "groups of 32: a group is a power of 4"),
        (PackedWeight("w", "int8_convrot", (256, 64), "w.s", group=256), INT8, "64 columns: they have to be"),
        (PackedWeight("w", "int8", (256, 64), "w.s", group=16), INT8, "only int8_convrot has groups"),
        (PackedWeight("w", "int8", (256, 64, 1), "w.s"), INT8, "it has to be a matrix"),
        (PackedWeight("w", "int8", (256, 0), "w.s"), INT8, "it has to be a matrix"),
        (
            PackedWeight("w", "int8", (256, 64), "w.s", input_scale="w.i"),
            INT8 | {"w.i": ONE},
            "has the input_scale w.i, of which",
        ),
        (PackedWeight("w", "int8", (256, 64), "w.s", "w.s"), INT8, "has the scale_2 w.s, of which this format has"),
        (MXFP8, {"w": Info("float8_e5m2", (200, 96)), "w.s": Info("uint8", (256, 4))}, "has to be float8_e4m3fn"),
        (MXFP8, {"w": Info("float8_e4m3fn", (200, 96)), "w.s": Info("uint8", (200, 3))}, "it has to be [256, 4]"),
        (PackedWeight("w", "nvfp4", (128, 80), "w.s"), {"w": Info("uint8", (128, 40)), **SCALE}, "has no scale_2"),
        (PackedWeight("w", "q4_k", (3, 300)), {"w": Info("uint8", (3, 288))}, "have to be a multiple of 256"),
        (PackedWeight("w", "q4_k", (3, 512)), {"w": Info("uint8", (3, 287))}, "takes [3, 288] of uint8"),
        (PackedWeight("w", "q4_k", ()), {"w": Info("uint8", (3, 288))}, "it has to be a matrix"),
        (PackedWeight("w", "float8", (2**40, 2**40)), {"w": Info("float8_e5m2", ())}, "too large for any memory"),
    ],
)
def test_a_fault_is_one_sentence_that_names_the_tensor(
    packed: PackedWeight, tensors: dict[str, Info], says: str
) -> None:
    found = weight_faults(packed, tensors)
    assert len(found) == 1
    assert found[0].startswith(f"tensor w, packed as {packed.format}, ")
    assert says in found[0]


def test_the_rotation_of_the_largest_group_takes_little_memory() -> None:
    """It is a matrix in float32, which stays in memory: a small weight must not ask for gigabytes."""
    assert 4 * MAX_GROUP**2 <= 4 * 2**20
    raw = msgspec.msgpack.encode(PackedWeight("w", "int8_convrot", (1, 4**8), "w.s", group=MAX_GROUP))
    assert msgspec.msgpack.decode(raw, type=PackedWeight).group == MAX_GROUP
    raw = msgspec.msgpack.encode(PackedWeight("w", "int8_convrot", (1, 4**8), "w.s", group=4 * MAX_GROUP))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(raw, type=PackedWeight)


def test_a_tensor_has_one_role() -> None:
    tensors = INT8 | {"v": INT8["w"]}
    twice = [PackedWeight(name, "int8", (256, 64), scale="w.s") for name in "wv"]
    assert packed_faults(twice, tensors) == [
        "tensor w.s is described as a companion of v, and also as a companion of w"
    ]
    assert packed_faults([twice[0], twice[0]], tensors) == [
        "tensor w is described as a packed weight, and also as a packed weight",
        "tensor w.s is described as a companion of w, and also as a companion of w",
    ]
    own = packed_faults([PackedWeight("w", "float8", (), scale="w")], {"w": Info("float32", ())})
    assert "tensor w is described as a companion of w, and also as a packed weight" in own


def lent(*tensors: TensorSpec, packed: PackedWeight) -> list[str]:
    block = HostShmBlock(fd=3, inode=1, size_bytes=2**20, fingerprint=Fingerprint(length_bytes=0, digest=bytes(16)))
    return Manifest(label="x", blocks=(block,), tensors=tensors, packed=(packed,)).faults()


def test_bytes_of_a_weight_and_its_companions_overlap_nowhere() -> None:
    packed = PackedWeight("w", "int8", (4, 8), scale="w.s")
    weight, scale = TensorSpec("w", "int8", (4, 8), 0, 0), TensorSpec("w.s", "float32", (4, 1), 0, 32)
    assert lent(weight, scale, packed=packed) == []
    assert lent(weight, TensorSpec("w.s", "float32", (4, 1), 0, 28), packed=packed) == [
        "tensor w.s begins inside the bytes of w: lend a clone() of it"
    ]


def test_blocks_and_scales_are_contiguous() -> None:
    weight, scale = TensorSpec("w", "int8", (4, 8), 0, 0, (1, 4)), TensorSpec("w.s", "float32", (4, 1), 0, 32)
    assert lent(weight, scale, packed=PackedWeight("w", "int8", (4, 8), scale="w.s")) == [
        "tensor w, of a weight packed as int8, has the strides [1, 4]: its bytes are read in order, "
        "so lend its contiguous()"
    ]
    channels_last = TensorSpec("w", "float8_e4m3fn", (4, 8), 0, 0, (1, 4))
    assert lent(channels_last, packed=PackedWeight("w", "float8", (4, 8))) == []


def test_blocks_have_the_sizes_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    for name, block in GGUF_BLOCKS.items():
        assert tuple(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]) == block, name
    formats: tuple[str, ...] = PackedFormat.__args__  # type: ignore[attr-defined]
    assert set(GGUF_BLOCKS) < set(formats)
    assert stored_shape(PackedWeight("w", "q6_k", (5, 256))) == (5, 210)
