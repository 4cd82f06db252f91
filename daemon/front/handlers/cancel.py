"""``Cancel``: cancel an earlier request of the same session."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import Cancelled
from xditd.ipc.replies import CancelNoted
from xditd.ipc.requests import Cancel


def cancel(service: Service, session: Session, request: Cancel) -> CancelNoted:
    """Cancel the job and answer. The cancelled request fails with its own reply: now if queued, else when it ends."""
    job = service.scheduler.find(session, request.target_request_id)
    if job is not None:
        service.scheduler.cancel(job, Cancelled(f"request {request.target_request_id} was cancelled by its client"))
    return CancelNoted(request_id=request.request_id)
