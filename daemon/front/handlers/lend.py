"""``Lend``: take a component on loan."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import BadRequest
from xditd.ipc.name_lists import listed
from xditd.ipc.replies import Lent
from xditd.ipc.requests import Lend


def lend(service: Service, session: Session, request: Lend) -> Lent | None:
    """Answer at once when these very bytes are on loan, else let the workers map them in turn.

    Raises:
        BadRequest: a manifest that describes nothing that can be mapped.
        Busy: the queue is full.
        LimitExceeded: the client has lent as much as one client may.
    """
    faults = request.manifest.faults()
    if faults:
        raise BadRequest(f"manifest of {request.manifest.label}: {listed(faults, joint='; ')}", names=faults)
    reused = service.loans.reuse(session, request)
    if reused is None:
        process = session.process
        leases, jobs = service.loans.leases.of_process(process), service.scheduler.of_process(process)
        rewritten = service.loans.leases.same_place(session, request.manifest)
        service.quotas.check_loan([lease for lease in leases if lease is not rewritten], jobs, request.manifest)
        service.scheduler.submit(Job(session, request, lambda job: service.loans.lend(job, request)))
    return reused
