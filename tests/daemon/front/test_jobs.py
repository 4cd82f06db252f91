"""Which places of tensors the daemon refuses before a job is queued."""

from __future__ import annotations

from typing import Any

import pytest

from xditd.daemon.front.handlers import jobs
from xditd.ipc.arguments import InIo
from xditd.ipc.errors import BadRequest
from xditd.ipc.requests import Call, Part
from xditd.ipc.tensors import CudaIpcBlock, Fingerprint, HostShmBlock

FINGERPRINT = Fingerprint(length_bytes=4096, digest=bytes(16))
DEVICE = CudaIpcBlock(device_uuid="GPU-1", handle=bytes(64), size_bytes=8192, fingerprint=FINGERPRINT)


def call(leaf: InIo, device_io: CudaIpcBlock | None = DEVICE, **more: Any) -> Call:
    return Call(
        request_id="1",
        component_id="c1",
        io=HostShmBlock(fd=3, inode=1, size_bytes=4096, fingerprint=FINGERPRINT),
        parts=(Part(arguments={"x": leaf}),),
        out_offset_bytes=0,
        out_size_bytes=0,
        device_io=device_io,
        **more,
    )


def leaf(offset_bytes: int, *, in_device_io: bool) -> InIo:
    return InIo(offset_bytes=offset_bytes, dtype="uint8", shape=(1,), in_device_io=in_device_io)


def test_each_tensor_is_checked_against_its_own_block() -> None:
    jobs._check_tensors(call(leaf(8191, in_device_io=True)))
    jobs._check_tensors(call(leaf(4095, in_device_io=False), None))
    with pytest.raises(BadRequest, match=r"parts\[0\]\.x ends at byte 4097 of an I/O block of 4096"):
        jobs._check_tensors(call(leaf(4096, in_device_io=False)))
    with pytest.raises(BadRequest, match=r"parts\[0\]\.x ends at byte 8193 of a block of device memory of 8192"):
        jobs._check_tensors(call(leaf(8192, in_device_io=True)))


def test_device_memory_that_is_not_described_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"parts\[0\]\.x is in device memory, but .* no block of it \(device_io\)"):
        jobs._check_tensors(call(leaf(0, in_device_io=True), None))


def test_room_for_results_lies_inside_the_block_of_device_memory() -> None:
    given = leaf(0, in_device_io=False)
    jobs._check_tensors(call(given, device_out_offset_bytes=4096, device_out_size_bytes=4096))
    with pytest.raises(BadRequest, match="device_out ends at byte 8193 of a block of device memory of 8192"):
        jobs._check_tensors(call(given, device_out_offset_bytes=4097, device_out_size_bytes=4096))
