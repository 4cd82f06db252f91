"""Fingerprints: equal for equal bytes, different otherwise, and never beyond a block's end."""

from __future__ import annotations

import subprocess
import sys
from hashlib import blake2b

import msgspec
import pytest
import torch

from xditd.ipc.errors import StaleSource
from xditd.ipc.tensors import Fingerprint
from xditd.ipc.transports.fingerprints import (
    SAMPLE_BYTES,
    check_fingerprint,
    digest_bytes,
    sample_bytes,
    take_fingerprint,
)


@pytest.fixture
def block() -> torch.Tensor:
    return torch.arange(10_000).to(torch.uint8)


def test_the_digest_is_blake2b_of_the_sample(block: torch.Tensor) -> None:
    found = take_fingerprint(block, 100, 50)
    assert (found.offset_bytes, found.length_bytes) == (100, 50)
    assert (
        found.digest
        == blake2b(bytes(block[100:150].tolist()), digest_size=16).digest()
        == digest_bytes(sample_bytes(block, 100, 50))
    )


@pytest.mark.parametrize(("offset", "wanted", "length"), [(0, 10**9, SAMPLE_BYTES), (9_990, 50, 10), (10_000, 50, 0)])
def test_samples_end_with_the_block(block: torch.Tensor, offset: int, wanted: int, length: int) -> None:
    found = take_fingerprint(block, offset, wanted)
    assert found.length_bytes == length
    check_fingerprint(block, found, "x")


def test_one_changed_byte_is_noticed_inside_the_sample_only(block: torch.Tensor) -> None:
    found = take_fingerprint(block, 100, 50)
    block[99] += 1
    block[150] += 1
    check_fingerprint(block, found, "x")
    block[149] += 1
    with pytest.raises(StaleSource, match="segment 7: its bytes are not those that were lent"):
        check_fingerprint(block, found, "segment 7")


@pytest.mark.parametrize(("offset", "length"), [(9_999, 2), (10_001, 0), (2**46, 0), (0, 2**25), (2**46, 2**25)])
def test_a_sample_beyond_the_block_is_refused(block: torch.Tensor, offset: int, length: int) -> None:
    beyond = Fingerprint(offset_bytes=offset, length_bytes=length, digest=bytes(16))
    assert msgspec.convert(msgspec.to_builtins(beyond), Fingerprint)  # the wire lets it pass
    with pytest.raises(StaleSource, match="10000 are mapped"):
        check_fingerprint(block, beyond, "x")


def test_torch_without_numpy_is_enough() -> None:
    """The client depends on neither, and torch works without numpy."""
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "import torch\n"
        "from xditd.ipc.transports.fingerprints import sample_bytes\n"
        "block = torch.arange(20).to(torch.uint8)\n"
        "assert sample_bytes(block, 3, 4) == bytes([3, 4, 5, 6])\n"
        "assert sample_bytes(block[::2], 3, 4) == bytes([6, 8, 10, 12])\n"
        "assert sample_bytes(block, 20, 0) == b''\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
