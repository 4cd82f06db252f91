"""The memory check: whether every worker reads what this process writes into shared memory."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Final

from xditd.client.connection import Connection
from xditd.client.mailboxes import Timeouts
from xditd.ipc.errors import StaleSource
from xditd.ipc.name_lists import listed
from xditd.ipc.replies import AnyEvent, MemoryChecked, Queued
from xditd.ipc.requests import CheckMemory

if TYPE_CHECKING:
    from xditd.client.io_blocks import IoPool

logger = logging.getLogger(__name__)

_CHECKED_BYTES: Final = 64


class MemoryCheck:
    """The memory check of one session, which is done once. Safe to use from several threads."""

    def __init__(self, pool: IoPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._is_done = False

    def run(self, connection: Connection, timeouts: Timeouts) -> None:
        """Check, unless that was done before.

        Raises:
            StaleSource: a worker read something else.
        """
        from xditd.ipc.transports.fingerprints import digest_bytes

        with self._lock:
            if self._is_done:
                return
            block = self._pool.borrow(_CHECKED_BYTES)
            written = os.urandom(_CHECKED_BYTES)
            block.arena.view(0, _CHECKED_BYTES)[:] = written
            request = CheckMemory(
                request_id=connection.next_request_id(),
                io=block.describe(),
                offset_bytes=0,
                length_bytes=_CHECKED_BYTES,
            )
            try:
                mailbox = connection.submit(request, "memory check")
            except BaseException:
                self._pool.give_back(block)
                raise
            mailbox.when_ended(lambda _: self._pool.give_back(block))
            seen = mailbox.wait(MemoryChecked, timeouts, on_event=lambda event: log_event("memory check", event))
            expected = digest_bytes(written)
            wrong = [rank for rank, digest in enumerate(seen.digests) if digest != expected]
            if wrong or not seen.digests:
                whose = f"worker {listed(wrong)} read other bytes" if wrong else "no worker read the bytes"
                raise StaleSource(
                    f"memory check: {whose} that this process wrote into shared memory; likely causes: client and "
                    "workers are in different containers or pid namespaces, or /proc is restricted; run both as one "
                    "user on one host"
                )
            self._is_done = True
            logger.info("shared memory read by all workers count=%d", len(seen.digests))


def log_event(label: str, event: AnyEvent) -> None:
    """Log why a request waits."""
    if isinstance(event, Queued):
        logger.info("waiting label=%s ahead=%d reason=%s", label, event.ahead, event.reason)
