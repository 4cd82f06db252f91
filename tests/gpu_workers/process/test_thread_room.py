"""A worker that cannot start its threads says so with the limit."""

from __future__ import annotations

import threading

import pytest

from xditd.gpu_workers.process import thread_room
from xditd.ipc import host_limits
from xditd.ipc.errors import WorkersLost


def test_a_worker_without_room_for_its_threads_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before native code ends the process; the threads that could be started are ended."""
    monkeypatch.setattr(host_limits, "describe_tasks", lambda: "50 for its control group (pids.max)")
    before, start, room = threading.active_count(), threading.Thread.start, iter(range(3))

    def limited(thread: threading.Thread) -> None:
        if next(room, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        with pytest.raises(WorkersLost) as raised:
            thread_room.check_threads(5)
    assert "can't start new thread: 3 of the 5 that a worker needs" in raised.value.detail
    assert (
        "allowed are 50 for its control group (pids.max); raise the limit (ulimit -u, TasksMax=" in raised.value.detail
    )
    assert threading.active_count() == before
    thread_room.check_threads(5)
    assert threading.active_count() == before
