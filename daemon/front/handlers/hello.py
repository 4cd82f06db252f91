"""``Hello``: open a session."""

from __future__ import annotations

import logging
import os

from xditd import __version__
from xditd.daemon.front.service import BEATS, Service
from xditd.daemon.sockets.credentials import Credentials
from xditd.ipc.errors import ProtocolMismatch
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.replies import Welcome
from xditd.ipc.requests import Hello

logger = logging.getLogger(__name__)


def greet(service: Service, routing_id: bytes, address: str, peer: Credentials, request: Hello) -> Welcome:
    """Open a session for a connection. A second hello on it changes nothing.

    Raises:
        Busy: too many clients.
        ProcessGone: the client has exited already.
        ProtocolMismatch: the client speaks another version.
    """
    if request.protocol_version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the client speaks protocol {request.protocol_version} (xditd {request.package_version}), the daemon "
            f"{PROTOCOL_VERSION} (xditd {__version__}); install the same version on both sides"
        )
    session = service.sessions.find(routing_id)
    if session is None:
        session = service.open_session(routing_id, address, peer, request.client_name)
        logger.debug("session opened client_pid=%d client_name=%s", peer.pid, request.client_name)
    return Welcome(
        request_id=request.request_id,
        protocol_version=PROTOCOL_VERSION,
        package_version=__version__,
        daemon_pid=os.getpid(),
        beat_every_s=service.configuration.client_deadline_s / BEATS,
        max_message_bytes=service.quotas.message_bytes,
        world_size=service.group.expected_world_size,
    )
