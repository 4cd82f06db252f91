"""``Adopt``: make a loan the workers' own."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.replies import Adopted
from xditd.ipc.requests import Adopt
from xditd.ipc.status import LeaseState
from xditd.ipc.tensors import CopiedBytes


def adopt(service: Service, session: Session, request: Adopt) -> Adopted | None:
    """Let the workers copy the component in turn; one that was adopted before stays as it is.

    Raises:
        Busy: the queue is full.
        LeaseLost, UnknownComponent: it is not on loan.
    """
    lease = service.loans.leases.live(request.component_id)
    if lease.state is LeaseState.ADOPTED:
        return Adopted(request_id=request.request_id, copied=CopiedBytes(), timings_ms={})
    service.scheduler.submit(Job(session, request, lambda job: service.loans.adopt(job, lease), (lease.component_id,)))
    return None
