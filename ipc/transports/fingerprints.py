"""Fingerprints of blocks: hashes with which a worker checks that it mapped the client's bytes."""

from __future__ import annotations

import ctypes
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from xditd.ipc.errors import StaleSource
from xditd.ipc.tensors import Fingerprint

if TYPE_CHECKING:
    import torch

SAMPLE_BYTES: Final = 4096


def digest_bytes(sample: bytes | memoryview) -> bytes:
    """Return the BLAKE2b-128 of bytes."""
    return blake2b(sample, digest_size=16).digest()


def sample_bytes(block: torch.Tensor, offset_bytes: int, length_bytes: int) -> bytes:
    """Read part of a block (1-D uint8, host or device). A device read waits for the current stream."""
    sample = block.narrow(0, offset_bytes, length_bytes).cpu().contiguous()
    # Not with numpy, on which torch and the client do not depend.
    return ctypes.string_at(sample.data_ptr(), length_bytes)


def take_fingerprint(block: torch.Tensor, offset_bytes: int = 0, length_bytes: int = SAMPLE_BYTES) -> Fingerprint:
    """Return a fingerprint of up to 4 KiB of a block from ``offset_bytes``."""
    length = min(length_bytes, SAMPLE_BYTES, block.numel() - offset_bytes)
    digest = digest_bytes(sample_bytes(block, offset_bytes, length))
    return Fingerprint(offset_bytes=offset_bytes, length_bytes=length, digest=digest)


def check_fingerprint(block: torch.Tensor, expected: Fingerprint, what: str) -> None:
    """Compare a mapped block with the client's fingerprint.

    Raises:
        StaleSource: the bytes differ, or the block is shorter than the sample.
    """
    end = expected.offset_bytes + expected.length_bytes
    if end > block.numel():
        raise StaleSource(f"{what}: fingerprint of bytes up to {end}, but {block.numel()} are mapped; lend it again")
    if digest_bytes(sample_bytes(block, expected.offset_bytes, expected.length_bytes)) != expected.digest:
        raise StaleSource(
            f"{what}: its bytes are not those that were lent (rewritten, reallocated, or another process's memory); "
            "lend it again"
        )
