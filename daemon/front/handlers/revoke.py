"""``Revoke``: end any client's lease, or free an adopted component."""

from __future__ import annotations

import logging

from xditd.daemon.front.service import Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import LeaseLost
from xditd.ipc.replies import Revoked
from xditd.ipc.requests import Revoke

logger = logging.getLogger(__name__)


def revoke(service: Service, session: Session, request: Revoke) -> None:
    """End the lease at once; the answer follows when no worker maps the component.

    Raises:
        LeaseLost, UnknownComponent: it is not on loan.
    """
    lease = service.lending.leases.find(request.component_id)
    why = LeaseLost(f"component {request.component_id}: revoked by process {session.process.pid}; lend it again")
    logger.info("loan revoked component_id=%s by_pid=%d", lease.component_id, session.process.pid)
    revoked = Revoked(request_id=request.request_id)
    service.lending.end(lease, why, lambda: service.replies.reply(session, revoked))
