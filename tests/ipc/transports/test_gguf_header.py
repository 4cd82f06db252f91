"""Headers of GGUF files: sound ones, as the ``gguf`` package reads them, and hostile ones."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import (
    KINDS,
    GgufTensor,
    array,
    array_pair,
    gguf_bytes,
    number_pair,
    original_shape,
    packed_tensor,
    plain_tensor,
    random_blocks,
    string_pair,
    text,
)

from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.packed import GGUF_BLOCKS, PackedWeight, packed_faults
from xditd.ipc.transports.gguf_header import read_header
from xditd.ipc.transports.stored_tensors import Header, StoredTensor

Read = Callable[[bytes], Header]
Refused = Callable[[bytes], str]

SMALL = GgufTensor("a", KINDS["float32"], (4,), bytes(16))
ARCHITECTURE = string_pair("general.architecture", "flux")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.gguf"


@pytest.fixture
def read(path: Path) -> Read:
    def write_and_read(content: bytes) -> Header:
        path.write_bytes(content)
        fd = os.open(path, os.O_RDONLY)
        try:
            return read_header(fd, str(path))
        finally:
            os.close(fd)

    return write_and_read


@pytest.fixture
def refused(path: Path, read: Read) -> Refused:
    """Return why a file is refused, without its name, which every refusal begins with."""

    def attempt(content: bytes) -> str:
        with pytest.raises(BadCheckpoint) as caught:
            read(content)
        assert caught.value.detail.startswith(f"{path}: ")
        assert len(caught.value.detail) < 2_000
        return caught.value.detail.removeprefix(f"{path}: ")

    return attempt


def every_kind() -> list[GgufTensor]:
    """One tensor of each type that is read, of four dimensions and fewer."""
    generator = torch.Generator().manual_seed(0)
    tensors = [plain_tensor("f32", torch.randn(3, 5, generator=generator))]
    tensors += [plain_tensor(f"f16.{rank}", torch.randn((2,) * rank, generator=generator).half()) for rank in range(5)]
    tensors.append(plain_tensor("bf16 \u2713", torch.randn(7, generator=generator).bfloat16()))
    for kind, block in GGUF_BLOCKS.items():
        tensors.append(packed_tensor(kind, kind, random_blocks(kind, 3, 2 * block.numbers, 1), 2 * block.numbers))
    return tensors


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_have_their_places_types_and_logical_shapes(
    path: Path, read: Read, version: int, alignment: int
) -> None:
    tensors = every_kind()
    pairs = [ARCHITECTURE, number_pair("general.alignment", alignment), number_pair("general.file_type", 15)]
    header = read(gguf_bytes(tensors, pairs, alignment=alignment, version=version))
    content = path.read_bytes()
    assert header.metadata == {"general.architecture": "flux"}
    packed = {each.weight: each for each in header.packed}
    assert packed.keys() == set(GGUF_BLOCKS)
    assert [stored.name for stored in header.tensors] == [tensor.name for tensor in tensors]
    for stored, tensor in zip(header.tensors, tensors, strict=True):
        assert content[stored.offset_bytes : stored.offset_bytes + stored.size_bytes] == tensor.data, stored
        assert stored.offset_bytes % alignment == 0
        logical = tuple(reversed(tensor.sides))
        if stored.name in packed:
            assert packed[stored.name] == PackedWeight(stored.name, stored.name, logical)  # type: ignore[arg-type]
            assert (stored.dtype, stored.shape) == ("uint8", (3, 2 * GGUF_BLOCKS[stored.name].size_bytes))
        else:
            assert (KINDS[stored.dtype], stored.shape) == (tensor.kind, logical)
    assert packed_faults(header.packed, {stored.name: stored for stored in header.tensors}) == []
    assert content[: header.length_bytes].endswith(
        struct.pack("<Q", header.tensors[-1].offset_bytes - start_of(header))
    )


def start_of(header: Header) -> int:
    """The place of the first tensor, from which offsets count."""
    return header.tensors[0].offset_bytes


def test_the_reader_of_the_gguf_package_finds_the_same(path: Path, read: Read) -> None:
    gguf = pytest.importorskip("gguf")
    header = read(gguf_bytes(every_kind(), [ARCHITECTURE, array_pair("x", 8, [text("a"), text("bb")])]))
    check_against_reader(gguf, path, header)


def test_files_that_the_gguf_package_writes_are_read_as_it_reads_them(path: Path, read: Read) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(str(path), "flux")
    writer.add_custom_alignment(64)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_array("names", ["a", "b"])
    writer.add_array("comfy.gguf.orig_shape.reshaped", [8, 32, 3])
    numbers = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    for kind in ("Q8_0", "Q4_0", "Q5_1", "F16", "BF16", "F32"):
        quantised = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{kind}.weight", gguf.quants.quantize(numbers, quantised), raw_dtype=quantised)
    writer.add_tensor("reshaped", numbers[:3, :256].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read(path.read_bytes())
    assert next(stored for stored in header.tensors if stored.name == "reshaped").shape == (8, 32, 3)
    check_against_reader(gguf, path, header, reshaped={"reshaped"})


def check_against_reader(gguf: Any, path: Path, header: Header, reshaped: Sequence[str] | set[str] = ()) -> None:
    found = {stored.name: stored for stored in header.tensors}
    packed = {each.weight: each for each in header.packed}
    theirs = gguf.GGUFReader(path).tensors
    assert found.keys() == {tensor.name for tensor in theirs}
    for tensor in theirs:
        stored = found[tensor.name]
        assert (stored.offset_bytes, stored.size_bytes) == (tensor.data_offset, tensor.n_bytes)
        kind = packed[tensor.name].format if tensor.name in packed else stored.dtype
        assert KINDS[kind] == tensor.tensor_type
        logical = packed[tensor.name].shape if tensor.name in packed else stored.shape
        if tensor.name not in reshaped:
            assert logical == tuple(reversed(tensor.shape.tolist()))
        if tensor.name in packed:
            assert stored.shape == tensor.data.shape


def test_a_reshaped_tensor_has_its_original_shape(read: Read) -> None:
    """As the converter of ComfyUI-GGUF writes tensors whose rows are no multiple of 256."""
    plain = GgufTensor("plain", KINDS["float32"], (256, 3), bytes(3072))
    blocks = random_blocks("q8_0", 5, 256, 0)
    header = read(
        gguf_bytes(
            [plain, packed_tensor("packed", "q8_0", blocks, 256)],
            [original_shape("plain", (8, 32, 3)), original_shape("packed", (4, 320)), original_shape("absent", (1,))],
        )
    )
    assert header.tensors[0].shape == (8, 32, 3)
    assert header.packed == (PackedWeight("packed", "q8_0", (4, 320)),)
    assert header.tensors[1].shape == (4, 340)
    assert header.tensors[1].size_bytes == blocks.numel()


def test_a_file_without_tensors_is_sound(read: Read) -> None:
    content = gguf_bytes([], [ARCHITECTURE])
    header = read(content)
    assert (header.tensors, header.packed) == ((), ())
    assert read(content[: header.length_bytes]).metadata == header.metadata


def test_a_file_cut_anywhere_is_refused(read: Read, refused: Refused) -> None:
    tensors = [SMALL, packed_tensor("b", "q4_0", random_blocks("q4_0", 2, 32, 0), 32)]
    whole = gguf_bytes(tensors, [ARCHITECTURE, array_pair("c", 8, [text("xy")])])
    header = read(whole)
    end = max(stored.offset_bytes + stored.size_bytes for stored in header.tensors)
    for length in range(end):
        assert "truncated" in refused(whole[:length]), length
    for length in range(end, len(whole)):  # the padding of the last tensor
        assert read(whole[:length]) == header


def tampered(tensor: GgufTensor = SMALL, **changes: Any) -> bytes:
    return gguf_bytes([GgufTensor(**{**vars(tensor), **changes})])


Q8 = packed_tensor("q", "q8_0", random_blocks("q8_0", 2, 64, 0), 64)
Q4_K = packed_tensor("k", "q4_k", random_blocks("q4_k", 5, 256, 0), 256)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GGML" + bytes(100), "a GGUF file begins with b'GGUF'"),
        (gguf_bytes([SMALL], version=1), "a GGUF file of version 1; versions 2 and 3 are read: get a newer file"),
        (gguf_bytes([SMALL], version=0), "a GGUF file of version 0;"),
        (gguf_bytes([SMALL], version=4), "a GGUF file of version 4; versions 2 and 3 are read: get an older file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "in big-endian byte order"),
        (gguf_bytes([SMALL], tensor_count=0), "bytes follow the last tensor"),
        (gguf_bytes([SMALL], tensor_count=2), "tensor 2 of 2: a name has 1 to 512 characters"),
        (gguf_bytes([SMALL], tensor_count=2**63), f"at most {limits.MAX_TENSORS} can be lent"),
        (gguf_bytes([], tensor_count=9, pair_count=9), "key-value pair 1 of 9 has an empty key; the file is damaged"),
        (gguf_bytes([SMALL], pair_count=2**64 - 1), f"at most {limits.MAX_GGUF_PAIRS} are read"),
        (gguf_bytes([SMALL], pair_count=1), "a name has 1 to 512 characters, not 0"),
        (gguf_bytes([], [text(b"\xff\xfe")]), "is not UTF-8"),
        (gguf_bytes([], [struct.pack("<Q", 2**63) + bytes(64)]), "a key of 9223372036854775808 bytes"),
        (gguf_bytes([], [struct.pack("<Q", 60_000) + bytes(64)]), "key-value pair 1 of 1 ends at byte 60032 of"),
        (gguf_bytes([], [ARCHITECTURE, ARCHITECTURE]), "the key 'general.architecture' appears twice"),
        (gguf_bytes([], [number_pair("general.architecture", 3)]), "has the type 4; it has to be a string"),
        (gguf_bytes([], [string_pair("general.architecture", "x" * 600)]), "a string of 600 bytes; at most 512"),
        (gguf_bytes([], [number_pair("k", 3, kind=13)]), "the value of 'k' has the type 13, which GGUF does not have"),
        (gguf_bytes([], [array_pair("k", 13, [bytes(8)])]), "has the type 13, which GGUF does not have"),
        (gguf_bytes([], [array_pair("k", 4, [bytes(64)], 2**62)]), "the value of 'k' ends at byte"),
        (gguf_bytes([], [array_pair("k", 8, [text("")] * 9, 2**40)]), f"at most {limits.MAX_GGUF_VALUES} are read"),
        (gguf_bytes([], [array_pair("k", 8, [text("")] * 9, 999_999)]), "the value of 'k' ends at byte"),
        (gguf_bytes([], [text("k") + struct.pack("<IQ", 8, 2**64 - 1)]), "the value of 'k' ends at byte"),
        (
            gguf_bytes([], [number_pair("split.count", 3, kind=2, code="H")]),
            "one of the 3 files of a split GGUF: merge",
        ),
        (gguf_bytes([SMALL], [number_pair("general.alignment", 0)]), "general.alignment is 0, not a power of 2"),
        (gguf_bytes([SMALL], [number_pair("general.alignment", 4)]), "general.alignment is 4, not a power of 2"),
        (gguf_bytes([SMALL], [number_pair("general.alignment", 24)]), "general.alignment is 24, not a power of 2"),
        (gguf_bytes([SMALL], [number_pair("general.alignment", 2**31)]), "is 2147483648, not a power of 2 from 8 to"),
        (
            gguf_bytes([SMALL], [number_pair("general.alignment", 64, 10, "Q")]),
            "has the type 10; it has to be a uint32",
        ),
        (gguf_bytes([SMALL, SMALL]), "tensor 'a' is listed twice"),
        (tampered(name=""), "a name has 1 to 512 characters, not 0"),
        (tampered(name="n" * 513), "a name has 1 to 512 characters, not 513"),
        (tampered(name="n" * 2049), "a name of 2049 bytes; at most 2048 are read"),
        (tampered(sides=(1,) * 6), "tensor 'a': 6 dimensions; a tensor has at most 5"),
        (tampered(sides=(0,)), "tensor 'a': dimensions [0]; each is 1 to"),
        (tampered(sides=(4, 2**63)), "tensor 'a': dimensions [4, 9223372036854775808]"),
        (tampered(sides=(2**46, 2**46, 2**46, 2**46)), "tensor 'a' ends at byte"),
        (tampered(sides=(9,)), "tensor 'a' ends at byte"),
        (tampered(sides=(400,)), "the file is truncated: get it again"),
        (tampered(kind=4), "tensor 'a': its type is 4, Q4_2, which no worker can read; get a file in Q8_0, "),
        (tampered(kind=16), "tensor 'a': its type is 16, IQ2_XXS, which no worker can read"),
        (tampered(kind=999), "tensor 'a': its type is 999, which is not known; get a file in"),
        (
            tampered(sides=(4, 1), kind=KINDS["q8_0"]),
            "tensor 'a': rows of 4 numbers are not a multiple of 32, the block of q8_0",
        ),
        (tampered(Q8, kind=KINDS["q4_k"]), "tensor 'q': rows of 64 numbers are not a multiple of 256"),
        (tampered(Q8, kind=KINDS["q5_1"]), "bytes follow the last tensor"),
        (tampered(Q8, sides=(128,)), "tensor 'q': its shape is [128], and only matrices can be packed, as q8_0 here"),
        (tampered(Q8, sides=()), "tensor 'q': its shape is [], and only matrices can be packed"),
        (
            gguf_bytes([GgufTensor("q", KINDS["q8_0"], (), bytes(34))], [original_shape("q", (1, 1))]),
            "tensor 'q': rows of 1 numbers are not a multiple of 32",
        ),
        (tampered(offset=16), "tensor 'a': its offset, 16, is not a multiple of the file's alignment, 32"),
        (tampered(offset=64), "leaves a gap before it"),
        (tampered(offset=2**64 - 32), "leaves a gap before it"),
        (gguf_bytes([SMALL, GgufTensor("b", 0, (4,), bytes(16), 0)]), "and overlaps the tensor before it"),
        (gguf_bytes([Q8, GgufTensor("b", 0, (4,), bytes(16), 128)]), "tensor 'b' starts at byte"),
        (gguf_bytes([SMALL, GgufTensor("b", 0, (4,), bytes(16), 64)]), "tensor 'b' starts at byte"),
        (gguf_bytes([SMALL]) + bytes(32), "bytes follow the last tensor"),
        (
            gguf_bytes([SMALL], [original_shape("a", (5,))]),
            "tensor 'a': its original shape [5] is not that of 4 numbers",
        ),
        (gguf_bytes([SMALL], [original_shape("a", (-2, -2))]), "its original shape [-2, -2] is not that of 4"),
        (gguf_bytes([SMALL], [original_shape("a", (1,) * 9)]), "has 9 dimensions; at most 8 can be lent"),
        (gguf_bytes([SMALL], [array_pair("comfy.gguf.orig_shape.a", 4, [])]), "it has to be an array of int32"),
        (gguf_bytes([SMALL], [string_pair("comfy.gguf.orig_shape.a", "4")]), "it has to be an array"),
        (
            gguf_bytes([Q4_K], [original_shape("k", (4, 320))]),
            "tensor 'k': original rows of 320 numbers are not a multiple of 256, the block of q4_k",
        ),
    ],
)
def test_files_that_lie_are_refused(refused: Refused, content: bytes, reason: str) -> None:
    assert reason in refused(content)


def test_arrays_in_arrays_are_read_down_to_a_limit(read: Read, refused: Refused) -> None:
    inner = array(4, [bytes(4)])
    for _ in range(limits.MAX_GGUF_NESTING - 2):
        inner = array(9, [inner])
    read(gguf_bytes([], [array_pair("k", 9, [inner])]))
    assert "arrays in arrays, more than 4 deep" in refused(gguf_bytes([], [array_pair("k", 9, [array(9, [inner])])]))


def test_the_worst_headers_take_little_time_and_memory(refused: Refused) -> None:
    """As large as the limits allow, and refused at the end: what then comes is no key, or is not there."""
    many = limits.MAX_GGUF_VALUES
    strings = gguf_bytes([], [array_pair("k", 8, [bytes(8)] * many)], pair_count=2)
    arrays = gguf_bytes([], [array_pair("k", 9, [array(4, [])] * many)], pair_count=2)
    large = limits.MAX_GGUF_HEADER_BYTES
    numbers = gguf_bytes([], [array_pair("k", 0, [bytes(large)], large)])
    tensors = [GgufTensor(f"{number:0512d}", 0, (1,) * 5, bytes(32)) for number in range(limits.MAX_TENSORS)]
    for content, reason in (
        (strings, "empty key"),
        (arrays, "empty key"),
        (numbers, f"a GGUF header has at most {large} bytes"),
        (gguf_bytes(tensors)[:-32], "truncated"),
    ):
        started = time.perf_counter()
        assert reason in refused(content)
        assert time.perf_counter() - started < 10.0
    tracemalloc.start()
    refused(gguf_bytes([], [array_pair("k", 0, [bytes(64)], 2**40)]))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_random_damage_raises_nothing_else(read: Read) -> None:
    tensors = [SMALL, Q8, packed_tensor("k", "q6_k", random_blocks("q6_k", 1, 256, 0), 256)]
    pairs = [
        ARCHITECTURE,
        number_pair("general.alignment", 32),
        original_shape("a", (2, 2)),
        array_pair("c", 8, [text("x")]),
    ]
    whole = gguf_bytes(tensors, pairs)
    end = start_of(read(whole))
    rng = random.Random(4)
    refusals = 0
    for _ in range(3_000):
        spoilt = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            where = rng.randrange(end)
            spoilt[where] = rng.choice([rng.randrange(256), spoilt[where] ^ (1 << rng.randrange(8))])
        try:
            header = read(bytes(spoilt))
        except BadCheckpoint:
            refusals += 1
        else:
            assert all(inside(stored, len(whole)) for stored in header.tensors)
            assert packed_faults(header.packed, {stored.name: stored for stored in header.tensors}) == []
    assert refusals > 1_000


def test_random_lies_raise_nothing_else(read: Read) -> None:
    """Every field is any of the values at which something changes, in files that are well-formed otherwise."""
    rng = random.Random(5)
    numbers = (0, 1, 2, 4, 31, 32, 64, 256, 2**31, 2**32, 2**46, 2**63, 2**64 - 1)
    sides = (*(1, 2, 32, 256) * 4, *numbers)
    outcomes, longest = {True: 0, False: 0}, 0
    for _ in range(2_000):
        tensors, pairs = [], [ARCHITECTURE]
        for name in "abc"[: rng.randrange(4)]:
            shape = [rng.choice(sides) for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 6)))]
            kind = rng.choice([*KINDS.values(), *KINDS.values(), rng.randrange(45)])
            offset = rng.choice([None] * 12 + [32 * each for each in range(4)] + [2**64 - 32, 2**63, 17])
            data = bytes(rng.choice((4, 16, 34, 144, 1024, 2048)))
            tensors.append(GgufTensor(name, kind, shape, data, offset))
            if rng.random() < 0.4:
                shape = rng.choice(
                    [shape[::-1], [1, 1], [1], [], [rng.choice((-1, 0, 1, 2, 32, 256)) for _ in range(2)]]
                )
                pairs.append(original_shape(name, [side if side < 2**31 else 7 for side in shape]))
        if rng.random() < 0.1:
            pairs.append(number_pair("general.alignment", rng.choice(numbers[:-4])))
        counts = {"tensor_count": rng.choice(numbers)} if rng.random() < 0.05 else {}
        content = gguf_bytes(tensors, pairs, **counts)
        try:
            header = read(content)
        except BadCheckpoint as error:
            outcomes[False] += 1
            longest = max(longest, len(error.detail))
        else:
            outcomes[True] += 1
            assert all(inside(stored, len(content)) for stored in header.tensors)
            assert packed_faults(header.packed, {stored.name: stored for stored in header.tensors}) == []
    assert min(outcomes.values()) > 200, outcomes
    assert longest < 2_000


def inside(stored: StoredTensor, file_bytes: int) -> bool:
    return 0 <= stored.offset_bytes <= stored.offset_bytes + stored.size_bytes <= file_bytes
