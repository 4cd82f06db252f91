"""``Announce``: have the workers build a model before its component is lent."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import BadRequest
from xditd.ipc.name_lists import SENTENCE_CHARS, listed
from xditd.ipc.replies import Announced
from xditd.ipc.requests import Announce


def announce(service: Service, session: Session, request: Announce) -> Announced:
    """Note the announcement; workers that are idle, now or later, build the model.

    Raises:
        BadRequest: the outline is inconsistent.
    """
    faults = request.outline.faults()
    if faults:
        raise BadRequest(
            f"outline of {request.outline.label}: {listed(faults, joint='; ', chars=SENTENCE_CHARS)}", names=faults
        )
    service.announcements.add(session, request.outline)
    return Announced(request_id=request.request_id)
