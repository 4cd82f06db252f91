"""The client that all nodes of this ComfyUI share; opened when a node first needs it."""

from __future__ import annotations

import threading

from xditd.client.client import Client
from xditd.ipc.addresses import RUNTIME_DIR_VARIABLE
from xditd.ipc.errors import DaemonUnreachable

_lock = threading.Lock()
_client: Client | None = None


def connect() -> Client:
    """Return the client of this process, connected to the running daemon, also after that has been restarted.

    Raises:
        DaemonUnreachable: no daemon answers; the message says how to start one.
    """
    global _client
    with _lock:
        try:
            if _client is None:
                _client = Client(name="ComfyUI")
            _ = _client.daemon_pid  # connects again if the daemon was restarted
        except DaemonUnreachable as error:
            raise DaemonUnreachable(
                f"{error.detail}. Start it (xditd serve), then queue the prompt again; ComfyUI can stay open. "
                f"If the daemon has a runtime folder of its own, set {RUNTIME_DIR_VARIABLE} to it."
            ) from None
        return _client
