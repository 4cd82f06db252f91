"""End a process when its parent ends, also if the parent is killed, or was before this process could ask for that."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from typing import Final

OUTPUT: Final = 1
"""The descriptor of a leader's output, which the daemon reads through a pipe."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies; exit at once if it is dead already.

    Source: prctl(2), PR_SET_PDEATHSIG. fork clears it, so each process calls this itself.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit("worker: the parent process is gone")


def has_no_reader(descriptor: int) -> bool:
    """Return whether ``descriptor`` is a pipe without a reader, as the leader's output is once the daemon has ended.

    Source: poll(2), POLLERR.
    """
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
