"""The one session that this ComfyUI has with the daemon. It is opened when a node first needs it."""

from __future__ import annotations

import threading

from xditd.client.client import Client
from xditd.ipc.addresses import RUNTIME_DIR_VARIABLE
from xditd.ipc.errors import DaemonUnreachable

_lock = threading.Lock()
_client: Client | None = None


def connect() -> Client:
    """Get the client of this process; the first call greets the daemon, later ones greet it again after a restart.

    Raises:
        DaemonUnreachable: no daemon answers; the message says how to start one.
    """
    global _client
    with _lock:
        try:
            if _client is None:
                _client = Client(name="ComfyUI")
            _ = _client.daemon_pid  # greets the new daemon where the last one is gone
        except DaemonUnreachable as error:
            raise DaemonUnreachable(
                f"{error.detail}. Start it (xditd serve), then queue the prompt again; ComfyUI can stay open. "
                f"A daemon with a folder of its own is found by {RUNTIME_DIR_VARIABLE}."
            ) from None
        return _client
