"""A leader that has imported everything and waits: an ended group is rebuilt by it, without the seconds of imports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from xditd.daemon.configuration import Configuration
from xditd.daemon.groups.leader import Leader
from xditd.daemon.groups.worker_output import WorkerOutput
from xditd.daemon.operations.event_loop import Callback, EventLoop, Timer
from xditd.daemon.operations.log_buffer import LogBuffer
from xditd.ipc.worker_messages import STANDBY_FLAG

logger = logging.getLogger(__name__)

DELAY_S: Final = 3.0
"""From a group that is ready to the start of its standby, so that the imports of the first lend come first."""

ANSWER_S: Final = 2.0
"""For a leader that has imported everything to begin. One that is stopped or stuck would cost the start's deadline."""

IMPORTS_S: Final = 60.0
"""From the start of a leader to the end of its imports, if the group ends before that."""

_OWN_WORKERS: Final = ("-m", "xditd.gpu_workers")
"""The end of a command that knows :data:`STANDBY_FLAG`."""


class Standby:
    """Keep at most one such leader. It is a child of the daemon as any leader, has no ranks and opens no GPU."""

    def __init__(
        self, loop: EventLoop, log_buffer: LogBuffer, configuration: Configuration, environment: Mapping[str, str]
    ) -> None:
        self._loop = loop
        self._log_buffer = log_buffer
        self._setting = configuration.standby
        self._command = configuration.worker_command
        self._environment = environment
        self._leader: Leader | None = None
        self._started_s = 0.0
        self._timer: Timer | None = None
        self._on_ended: Callback | None = None

    def start_later(self, device_kind: str) -> None:
        """Start one in :data:`DELAY_S`, unless there is one, or the setting or the workers' command is against it."""
        is_wanted = self._setting == "on" or (self._setting == "auto" and device_kind == "cuda")
        if is_wanted and self._command[-2:] == _OWN_WORKERS and self._leader is None:
            self._cancel()
            self._timer = self._loop.call_later(DELAY_S, self._start)

    def take(
        self, arguments: Sequence[str], on_gone: Callable[[int, WorkerOutput], None], on_silent: Callback
    ) -> Leader | None:
        """Hand the waiting leader over, which then begins with ``arguments``; ``None`` if there is none.

        ``on_silent`` is called if it does not begin in time: it is of no use then.
        """
        self._cancel()
        leader, self._leader = self._leader, None
        if leader is not None:
            leader.on_gone = on_gone
            age_s = self._loop.clock.waited_s(self._started_s)
            leader.begin(arguments, ANSWER_S if leader.has_imported else max(ANSWER_S, IMPORTS_S - age_s), on_silent)
        return leader

    def end(self, on_ended: Callback) -> None:
        """End the waiting leader, and start none again; ``on_ended`` is called once its process has ended."""
        self._setting = "off"
        self._cancel()
        if self._leader is None:
            on_ended()
        else:
            self._on_ended = on_ended
            self._leader.kill()

    def kill(self) -> None:
        """Kill the waiting leader now; for a daemon that exits without waiting."""
        if self._leader is not None:
            self._leader.kill()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self) -> None:
        self._timer = None
        try:
            command = [*self._command, STANDBY_FLAG]
            self._leader = Leader(self._loop, self._log_buffer, command, self._environment, self._gone, waits=True)
        except OSError as error:
            logger.warning("no standby leader, so a rebuilt group has to import again: %s", error.strerror)
            return
        self._started_s = self._loop.clock.now_s()
        logger.info("standby leader started pid=%d", self._leader.pid)

    def _gone(self, status: int, output: WorkerOutput) -> None:
        self._leader = None
        if self._on_ended is not None:
            self._on_ended()
        else:
            logger.warning(
                "the standby leader is gone; a rebuilt group has to import again: %s", output.explain(status)
            )
