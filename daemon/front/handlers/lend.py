"""``Lend``: map a client's component in the workers."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import BadRequest
from xditd.ipc.name_lists import SENTENCE_CHARS, listed
from xditd.ipc.replies import Lent
from xditd.ipc.requests import Lend


def lend(service: Service, session: Session, request: Lend) -> Lent | None:
    """Answer at once if the same bytes are lent already, else queue the mapping.

    Raises:
        BadRequest: the manifest is inconsistent.
        Busy: the queue is full.
        LimitExceeded: the client has lent as much as one client may.
    """
    faults = request.manifest.faults()
    if faults:
        raise BadRequest(
            f"manifest of {request.manifest.label}: {listed(faults, joint='; ', chars=SENTENCE_CHARS)}", names=faults
        )
    reused = service.lending.reuse(session, request)
    if reused is None:
        process = session.process
        leases, jobs = service.lending.leases.of_process(process), service.scheduler.of_process(process)
        rewritten = service.lending.leases.find_same_memory(session, request.manifest)
        service.quotas.check_loan([lease for lease in leases if lease is not rewritten], jobs, request.manifest)
        service.scheduler.submit(Job(session, request, lambda job: service.lending.lend(job, request)))
    return reused
