"""``PendingJob``: a job that was sent, with its replies, its cancellation, and the block of its tensors."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import TypeVar

from xditd.client.connection import Connection
from xditd.client.io_blocks import IoBlock, IoPool
from xditd.client.jobs.job_scopes import current_scope
from xditd.client.mailboxes import Ending, Timeouts
from xditd.ipc.errors import BY_CODE, RequestError, XditdError
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import AnyReply, Failed
from xditd.ipc.requests import Cancel, InferenceRequest

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Reply)


class PendingJob:
    """A job that was sent to the daemon. Always close it: that cancels the job if it still runs.

    The block returns to the pool only when the daemon reports that the job has ended: until then workers may write
    to it.
    """

    def __init__(
        self,
        connection: Connection,
        pool: IoPool,
        request: InferenceRequest,
        block: IoBlock,
        timeouts: Timeouts,
        purpose: str,
    ) -> None:
        self._connection = connection
        self._pool = pool
        self._block = block
        self._timeouts = timeouts
        self._is_closed = False
        self._is_cancelled = False
        self._lock = threading.Lock()
        self._request_id = request.request_id
        self._scope = current_scope()
        try:
            self._mailbox = connection.submit(request, purpose)
        except BaseException:
            pool.give_back(block)
            raise
        if self._scope is not None:
            self._scope.add(self)

    @property
    def request_id(self) -> str:
        return self._request_id

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def take(self) -> AnyReply:
        """Wait for the next event or the reply. A fork, where nothing arrives, is refused."""
        self._connection.maker.check()
        return self._mailbox.take(self._timeouts)

    def wait(self, reply_type: type[R]) -> R:
        """Wait for the reply, dropping events; as :meth:`take`."""
        self._connection.maker.check()
        return self._mailbox.wait(reply_type, self._timeouts)

    def wait_sent(self) -> None:
        """Wait until the request is sent; see :meth:`Connection.wait_sent`."""
        self._connection.wait_sent()

    def cancel(self) -> None:
        """Ask the daemon to stop the job at its next step, without waiting. No error if the job has ended.

        Does nothing in a fork.
        """
        if not self._connection.maker.is_here:
            return
        with self._lock:
            if self._is_cancelled or self._mailbox.is_ended:
                return
            self._is_cancelled = True
        try:
            self._connection.submit(
                Cancel(request_id=self._connection.next_request_id(), target_request_id=self._request_id)
            )
        except XditdError as error:
            # The connection has ended, and with it the session and its jobs.
            logger.debug("cancel not sent request_id=%s reason=%s", self._request_id, error)

    def close(self) -> None:
        """Cancel the job unless it has ended, and release its block when it has. May be called twice.

        Does nothing in a fork.
        """
        if not self._connection.maker.is_here:
            return
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._scope is not None:
            self._scope.discard(self)
        self.cancel()
        pool, block = self._pool, self._block
        self._mailbox.when_ended(lambda ending: (pool.give_back if _have_workers_stopped(ending) else pool.drop)(block))

    def close_soon(self) -> None:
        """Close the job on the connection's thread: for finalizers, which must not wait for a lock."""
        self._connection.run_soon(self.close)

    def __enter__(self) -> PendingJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _have_workers_stopped(ending: Ending) -> bool:
    """Return whether every worker has certainly stopped writing to the block.

    That is so only after a result or a refusal of the request: a job that was cancelled, or whose loan was lost, may
    have ended with its group, and some ranks may still run until they are killed.
    """
    if isinstance(ending, Failed):
        return issubclass(BY_CODE.get(ending.code, XditdError), RequestError)
    return not isinstance(ending, XditdError)
