"""``CheckMemory``: every rank hashes part of the client's shared memory, which the client compares."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.queue.commands import Script, expect
from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import BadRequest
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import MemoryChecked
from xditd.ipc.requests import CheckMemory
from xditd.ipc.worker_messages import DigestIo, IoDigested


def check(service: Service, session: Session, request: CheckMemory) -> None:
    """Queue the memory check.

    Raises:
        BadRequest: it reaches beyond the I/O block.
        Busy: the queue is full.
        LimitExceeded: the client's I/O blocks are larger than one client's may be.
    """
    end = request.offset_bytes + request.length_bytes
    if end > request.io.size_bytes:
        raise BadRequest(f"memory check ends at byte {end} of an I/O block of {request.io.size_bytes}")
    service.quotas.check_io(service.scheduler.of_process(session.process), request.io)
    session.has_io = True

    def read(_: Job) -> Script[Reply]:
        answers = yield lambda number: DigestIo(
            op_number=number,
            io=request.io,
            offset_bytes=request.offset_bytes,
            length_bytes=request.length_bytes,
            exporter=session.process,
        )
        digests = tuple(answer.digest for answer in expect(answers, IoDigested))
        return MemoryChecked(request_id=request.request_id, digests=digests)

    service.scheduler.submit(Job(session, request, read))
