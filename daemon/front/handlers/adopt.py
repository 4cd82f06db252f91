"""``Adopt``: have the workers keep a copy of a lent component."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.queue.jobs import Job
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.replies import Adopted
from xditd.ipc.requests import Adopt
from xditd.ipc.status import LeaseState
from xditd.ipc.tensors import CopiedBytes


def adopt(service: Service, session: Session, request: Adopt) -> Adopted | None:
    """Queue the copy of a component; one that is adopted already is answered at once.

    Raises:
        Busy: the queue is full.
        LeaseLost, UnknownComponent: it is not on loan.
    """
    lease = service.lending.leases.live(request.component_id)
    if lease.state is LeaseState.ADOPTED:
        return Adopted(request_id=request.request_id, copied=CopiedBytes(), timings_ms={})
    service.scheduler.submit(
        Job(session, request, lambda job: service.lending.adopt(job, lease), (lease.component_id,))
    )
    return None
