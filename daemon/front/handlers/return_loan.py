"""``ReturnLoan``: give a component back to its owner."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import LeaseLost, NotPermitted
from xditd.ipc.replies import Returned
from xditd.ipc.requests import ReturnLoan
from xditd.ipc.status import LeaseState


def take_back(service: Service, session: Session, request: ReturnLoan) -> Returned | None:
    """Count one return; the last one ends the lease, and is answered once no worker maps the loan."""
    lease = service.loans.leases.find(request.component_id)
    if lease.session.process != session.process:
        owner = lease.session.process.pid
        raise NotPermitted(f"component {request.component_id}: lent by process {owner}; only its owner takes it back")
    returned = Returned(request_id=request.request_id)
    lease.holds -= 1
    # Of an adopted component the workers map nothing that is its owner's.
    if lease.holds > 0 or lease.state is LeaseState.ADOPTED:
        return returned
    why = LeaseLost(f"component {request.component_id}: its owner took it back; lend it again")
    service.loans.end(lease, why, lambda: service.replies.reply(session, returned), is_returned=True)
    return None
