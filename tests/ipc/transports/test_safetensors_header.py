"""Headers of safetensors files: those that the reference library writes, and hostile ones."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.transports.safetensors_header import read_header
from xditd.ipc.transports.stored_tensors import Header
from xditd.ipc.transports.tensor_views import torch_dtype

Read = Callable[[Path], Header]
U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.fixture
def read() -> Read:
    def open_and_read(path: Path) -> Header:
        fd = os.open(path, os.O_RDONLY)
        try:
            return read_header(fd, str(path))
        finally:
            os.close(fd)

    return open_and_read


@pytest.fixture
def refused(path: Path, read: Read) -> Callable[..., str]:
    """Write a file with this header and data, and return why it is refused."""

    def attempt(header: Any, data: bytes = bytes(4), length: int | None = None) -> str:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        with pytest.raises(BadCheckpoint) as caught:
            read(path)
        assert caught.value.detail.startswith(f"{path}: ")
        return caught.value.detail.removeprefix(f"{path}: ")

    return attempt


def test_offsets_are_those_of_the_bytes(path: Path, read: Read) -> None:
    generator = torch.Generator().manual_seed(3)
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
    dtypes += [torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    saved = {}
    for number, dtype in enumerate(dtypes):
        saved[f"name.{number}"] = torch.randint(0, 2, (3, number + 1), generator=generator).to(dtype)
    saved |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 7), "ünïcode \u2713": torch.ones(2)}
    save_file(saved, path, metadata={"format": "pt", "note": "x" * 1000})

    header = read(path)
    content = path.read_bytes()
    assert {stored.name for stored in header.tensors} == set(saved)
    for stored in header.tensors:
        found = bytearray(content[stored.offset_bytes : stored.offset_bytes + stored.size_bytes])
        dtype = torch_dtype(stored.dtype)
        tensor = torch.frombuffer(found, dtype=dtype) if found else torch.zeros(0, dtype=dtype)
        assert torch.equal(tensor.view(stored.shape).to(torch.float64), saved[stored.name].to(torch.float64)), stored
        assert dtype == saved[stored.name].dtype


def test_a_file_without_tensors_is_sound(path: Path, read: Read) -> None:
    save_file({}, path)
    header = read(path)
    assert header.tensors == ()
    assert header.length_bytes == path.stat().st_size


def test_a_file_cut_anywhere_is_refused(path: Path, read: Read) -> None:
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}, path)
    whole = path.read_bytes()
    read(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint, match=r"truncated|8 bytes|empty"):
            read(path)


def test_bytes_after_the_last_tensor_are_refused(refused: Callable[..., str]) -> None:
    assert "bytes follow the last tensor" in refused({"a": U8}, bytes(5))
    assert "bytes follow the last tensor" in refused({}, b"x")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**63 - 9, 2**40, limits.MAX_SAFETENSORS_HEADER_BYTES + 1])
def test_a_giant_header_length_allocates_nothing(refused: Callable[..., str], length: int) -> None:
    assert f"header of {length} bytes" in refused({"a": U8}, length=length)


def test_other_formats_are_refused(path: Path, read: Read) -> None:
    torch.save({"a": torch.ones(3)}, path)  # a zip file
    with pytest.raises(BadCheckpoint, match="this is a pickle in a zip archive"):
        read(path)
    for content in (b"", b"\0" * 7, b"\0" * 8, b"\0" * 100, b"GGUF\x03\0\0\0" + bytes(64), os.urandom(64)):
        path.write_bytes(content)
        with pytest.raises(BadCheckpoint):
            read(path)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "begins with zeros"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": ', "not JSON"),
        (b'{"a": NaN}', "an entry has exactly"),
        (b'\xff\xfe{"a": 1}', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 200_000, "not JSON"),
        (b'{"a": 1' + b"0" * 5_000 + b"}", "not JSON"),
        (b'{"a": {}, "a": {}}', "a name appears twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}', "a name appears twice"),
        ({"a": []}, "an entry has exactly"),
        ({"a": U8 | {"extra": 1}}, "an entry has exactly"),
        ({"a": {"dtype": "U8", "shape": [4]}}, "an entry has exactly"),
        ({"a": U8 | {"dtype": "F4"}}, "dtype 'F4'"),
        ({"a": U8 | {"dtype": ["U8"]}}, "dtype"),
        ({"a": U8 | {"dtype": {"U8": 1}}}, "dtype"),
        ({"a": U8 | {"shape": 4}}, "shape 4"),
        ({"a": U8 | {"shape": [-4]}}, "shape [-4]"),
        ({"a": U8 | {"shape": [-2, -2]}}, "shape [-2, -2]"),
        ({"a": U8 | {"shape": [4.0]}}, "shape [4.0]"),
        ({"a": U8 | {"shape": [True, 4]}}, "shape [True, 4]"),
        ({"a": U8 | {"shape": ["4"]}}, "shape ['4']"),
        ({"a": U8 | {"shape": [4] + [1] * 8}}, "at most 8"),
        ({"a": U8 | {"shape": [2**64 + 4]}}, "shape"),
        ({"a": U8 | {"shape": [2**46, 2**46]}}, "needs"),  # wraps to 0 in 64 bits
        ({"a": U8 | {"shape": [2**32, 2**32], "data_offsets": [0, 0]}}, "needs"),
        ({"a": U8 | {"shape": [3]}}, "4 bytes, but uint8 [3] needs 3"),
        ({"a": U8 | {"dtype": "F32"}}, "needs 16"),
        ({"a": U8 | {"data_offsets": [0]}}, "data_offsets [0]"),
        ({"a": U8 | {"data_offsets": [0, 4, 8]}}, "data_offsets"),
        ({"a": U8 | {"data_offsets": [4, 0]}}, "data_offsets [4, 0]"),
        ({"a": U8 | {"data_offsets": [-4, 0]}}, "data_offsets [-4, 0]"),
        ({"a": U8 | {"data_offsets": [2**64 - 4, 2**64]}}, "data_offsets"),
        ({"a": U8 | {"data_offsets": [2**45, 2**45 + 4]}}, "leaves a gap"),
        ({"a": U8 | {"data_offsets": [1, 5]}}, "leaves a gap before it"),
        ({"a": U8, "b": U8}, "overlaps the tensor before it"),
        ({"a": U8, "b": U8 | {"data_offsets": [3, 7]}}, "overlaps the tensor before it"),
        ({"a": U8, "b": U8 | {"data_offsets": [4, 8]}}, "the file is truncated"),
        ({"a": U8, "b": U8 | {"data_offsets": [5, 9]}}, "leaves a gap before it"),
        ({"": U8}, "name"),
        ({"n" * (limits.MAX_NAME_CHARS + 1): U8}, "name"),
        ({"lone surrogate \ud800": U8}, "name"),
        ({str(n): U8 | {"shape": [0], "data_offsets": [0, 0]} for n in range(limits.MAX_TENSORS + 1)}, "at most 16384"),
    ],
)
def test_headers_that_lie_are_refused(refused: Callable[..., str], header: Any, reason: str) -> None:
    detail = refused(header)
    assert reason in detail
    assert len(detail) < 2_000


def test_a_refusal_of_a_huge_entry_is_short(refused: Callable[..., str]) -> None:
    for entry in (U8 | {"shape": [1] * 10**6}, U8 | {"dtype": "x" * 10**6}, U8 | {"data_offsets": [1] * 10**6}):
        assert len(refused({"a": entry})) < 2_000


def test_metadata_may_hold_anything(path: Path, read: Read) -> None:
    text = json.dumps({"__metadata__": {"a": {"b": [1, None]}}, "a": U8}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert [stored.name for stored in read(path).tensors] == ["a"]


def test_random_damage_raises_nothing_else(path: Path, read: Read) -> None:
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    rng = random.Random(4)
    refusals = 0
    for _ in range(1_500):
        spoilt = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            spoilt[rng.randrange(len(whole) - 20)] = rng.randrange(256)
        path.write_bytes(spoilt)
        try:
            header = read(path)
        except BadCheckpoint:
            refusals += 1
        else:
            end = max(stored.offset_bytes + stored.size_bytes for stored in header.tensors)
            assert end == len(whole)
    assert refusals > 500
