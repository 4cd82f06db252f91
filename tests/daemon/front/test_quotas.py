from __future__ import annotations

from dataclasses import replace

import pytest

from xditd.daemon.configuration import Configuration
from xditd.daemon.front.quotas import Quotas
from xditd.daemon.loans.leases import Lease
from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import LimitExceeded
from xditd.ipc.job_parts import Part
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import Call, CheckMemory, Lend
from xditd.ipc.tensors import ComponentKind, CudaIpcBlock, Fingerprint, HostShmBlock, Manifest, TensorSpec

OWNER = Session(b"", "", ProcessIdentity(pid=1, start_ticks=0), -1, "test")
TENSOR_BYTES = 64


def quotas(**changed: int) -> Quotas:
    return replace(Quotas.of(Configuration()), **changed)


def block(inode: int = 1, size_bytes: int = 4096) -> HostShmBlock:
    fingerprint = Fingerprint(length_bytes=0, digest=bytes(16))
    return HostShmBlock(fd=3, inode=inode, size_bytes=size_bytes, fingerprint=fingerprint)


def manifest() -> Manifest:
    spec = TensorSpec("weight", "float32", (4, 4), 0, 0)
    return Manifest(kind=ComponentKind.TRANSFORMER, label="tiny", blocks=(block(),), tensors=(spec,), generation=0)


def lease() -> Lease:
    return Lease("c1", OWNER, manifest())


def job(request: Lend | CheckMemory | Call) -> Job:
    return Job(OWNER, request, lambda _: iter(()))  # type: ignore[arg-type, return-value]


def test_loans_are_counted_with_the_lends_that_wait() -> None:
    waiting = job(Lend(request_id="1", manifest=manifest()))
    quotas(loans=3).check_loan([lease()], [waiting], manifest())
    with pytest.raises(LimitExceeded, match=r"2 loans already \(client_loan_limit 2\); return one"):
        quotas(loans=2).check_loan([lease()], [waiting], manifest())
    waiting.component_ids = ("c1",)  # it runs: now its lease is counted
    quotas(loans=2).check_loan([lease()], [waiting], manifest())


def test_lent_bytes_add_up() -> None:
    quotas(lent_bytes=2 * TENSOR_BYTES).check_loan([lease()], [], manifest())
    with pytest.raises(LimitExceeded, match=r"64 bytes on top of the 64 .* exceed client_lent_bytes 127"):
        quotas(lent_bytes=2 * TENSOR_BYTES - 1).check_loan([lease()], [], manifest())


def test_io_blocks_count_once_each() -> None:
    def check(inode: int) -> Job:
        return job(CheckMemory(request_id="1", io=block(inode), offset_bytes=0, length_bytes=1))

    quotas(io_bytes=4096).check_io([check(1), check(1)], block(1))
    with pytest.raises(LimitExceeded, match=r"8192 bytes in 2 blocks: .* 8191 at a time"):
        quotas(io_bytes=8191).check_io([check(1)], block(2))


def test_blocks_of_device_memory_count_with_the_io_blocks() -> None:
    def device_block(number: int) -> CudaIpcBlock:
        fingerprint = Fingerprint(length_bytes=4096, digest=bytes([number] * 16))
        return CudaIpcBlock(device_uuid="GPU-1", handle=bytes(64), size_bytes=8192, fingerprint=fingerprint)

    def call(number: int) -> Job:
        parts = (Part(arguments={}),)
        return job(
            Call(
                request_id="1",
                component_id="c1",
                io=block(1),
                parts=parts,
                out_offset_bytes=0,
                out_size_bytes=0,
                device_io=device_block(number),
            )
        )

    quotas(io_bytes=12288).check_io([call(1)], block(1), device_block(1))
    with pytest.raises(LimitExceeded, match=r"20480 bytes in 3 blocks"):
        quotas(io_bytes=20479).check_io([call(1)], block(1), device_block(2))


def test_message_size() -> None:
    quotas(message_bytes=10).check_message(10)
    with pytest.raises(LimitExceeded, match=r"message of 11 bytes: at most 10 are read \(message_bytes\)"):
        quotas(message_bytes=10).check_message(11)
