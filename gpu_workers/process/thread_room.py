"""Check that a worker can start its threads: native code that cannot ends the process by SIGABRT."""

from __future__ import annotations

import threading
from typing import Final

from xditd.ipc.errors import WorkersLost
from xditd.ipc.host_limits import without_threads

THREADS_OF_A_RANK: Final = 64
"""Threads that a rank on the CPU has started when it is ready, on two cores: gloo's, mostly."""


def check_threads(count: int) -> None:
    """Start ``count`` threads at once, and end them: where that fails, native code would end this process by SIGABRT.

    Raises:
        WorkersLost: there is no room for so many.
    """
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise WorkersLost(without_threads(f"{error}: {len(started)} of the {count} that a worker needs")) from error
    finally:
        done.set()
        for thread in started:
            thread.join()
