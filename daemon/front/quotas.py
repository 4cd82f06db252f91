"""Quotas: limits on what one client may use, so that it cannot exclude the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xditd.daemon.configuration import Configuration
from xditd.daemon.loans.leases import Lease
from xditd.daemon.queue.jobs import Job
from xditd.ipc.errors import LimitExceeded
from xditd.ipc.requests import Lend
from xditd.ipc.tensors import CudaIpcBlock, HostShmBlock, Manifest


@dataclass(frozen=True)
class Quotas:
    """Limits for each client, which is a process, however many connections it opens."""

    loans: int
    lent_bytes: int
    io_bytes: int
    message_bytes: int

    @classmethod
    def of(cls, configuration: Configuration) -> Quotas:
        return cls(
            loans=configuration.client_loan_limit,
            lent_bytes=configuration.client_lent_bytes,
            io_bytes=configuration.client_io_bytes,
            message_bytes=configuration.message_bytes,
        )

    def check_message(self, size_bytes: int) -> None:
        """Check the size of a message before it is decoded; raises ``LimitExceeded``."""
        if size_bytes > self.message_bytes:
            raise LimitExceeded(
                f"message of {size_bytes} bytes: at most {self.message_bytes} are read (message_bytes); lend a "
                "component in fewer, larger blocks, or have the operator raise it"
            )

    def check_loan(self, leases: Iterable[Lease], jobs: Iterable[Job], manifest: Manifest) -> None:
        """Check that a client with these leases and jobs may lend one more component.

        Raises:
            LimitExceeded: too many loans, or too many bytes.
        """
        found = [lease.lent_bytes for lease in leases]
        # A lend that has begun has a lease already, and names its component.
        waiting = [job.request.manifest for job in jobs if isinstance(job.request, Lend) and not job.component_ids]
        if len(found) + len(waiting) >= self.loans:
            raise LimitExceeded(
                f"{manifest.label}: this client has {len(found) + len(waiting)} loans already (client_loan_limit "
                f"{self.loans}); return one first, or have the operator raise it"
            )
        lent_bytes = sum(found) + sum(each.tensor_bytes for each in waiting)
        new_bytes = manifest.tensor_bytes
        if lent_bytes + new_bytes > self.lent_bytes:
            raise LimitExceeded(
                f"{manifest.label}: {new_bytes} bytes on top of the {lent_bytes} that this client has lent exceed "
                f"client_lent_bytes {self.lent_bytes}; return a loan first, or have the operator raise it"
            )

    def check_io(self, jobs: Iterable[Job], block: HostShmBlock, device_block: CudaIpcBlock | None = None) -> None:
        """Check the bytes of the I/O blocks of a client's jobs and of one more; raises ``LimitExceeded``.

        Blocks of device memory count, too.
        """
        blocks: dict[int | bytes, int] = {}
        for job in jobs:
            for io in (getattr(job.request, "io", None), getattr(job.request, "device_io", None)):
                if isinstance(io, (HostShmBlock, CudaIpcBlock)):
                    blocks[_identity(io)] = io.size_bytes
        for io in (block, device_block):
            if io is not None:
                blocks[_identity(io)] = io.size_bytes
        if sum(blocks.values()) > self.io_bytes:
            raise LimitExceeded(
                f"I/O blocks of {sum(blocks.values())} bytes in {len(blocks)} blocks: a client's requests may use at "
                f"most {self.io_bytes} at a time (client_io_bytes); wait for a result, ask for smaller batches, or "
                "have the operator raise it"
            )


def _identity(block: HostShmBlock | CudaIpcBlock) -> int | bytes:
    return block.inode if isinstance(block, HostShmBlock) else block.fingerprint.digest
