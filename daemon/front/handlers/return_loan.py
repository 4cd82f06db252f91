"""``ReturnLoan``: give a component back to its owner."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import LeaseLost, NotPermitted
from xditd.ipc.replies import Returned
from xditd.ipc.requests import ReturnLoan
from xditd.ipc.status import LeaseState


def take_back(service: Service, session: Session, request: ReturnLoan) -> Returned | None:
    """Count one return. The last one ends the lease, and is answered once no worker maps the component."""
    lease = service.lending.leases.find(request.component_id)
    if lease.session.process != session.process:
        owner = lease.session.process.pid
        raise NotPermitted(f"component {request.component_id}: lent by process {owner}, which alone may return it")
    returned = Returned(request_id=request.request_id)
    lease.holds -= 1
    # The workers map none of the owner's memory once a component is adopted.
    if lease.holds > 0 or lease.state is LeaseState.ADOPTED:
        return returned
    why = LeaseLost(f"component {request.component_id}: its owner took it back; lend it again")
    service.lending.end(lease, why, lambda: service.replies.reply(session, returned), is_returned=True)
    return None
