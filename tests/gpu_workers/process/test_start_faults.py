"""Why a worker cannot start, in one line, and whether a restart can help."""

from __future__ import annotations

import errno

import pytest

from xditd.gpu_workers.process.start_faults import explain
from xditd.ipc.errors import Unsupported, WorkersLost


@pytest.mark.parametrize(
    ("error", "says", "is_final"),
    [
        (Unsupported("precision 'fp8' does not run here"), "precision 'fp8' does not run here", True),
        (ModuleNotFoundError("No module named 'xfuser'"), "No module named 'xfuser'; install it there", True),
        (OSError(errno.EMFILE, "Too many open files"), "the hard limit of this process is", True),
        (RuntimeError("pipe: Too many open files"), "the hard limit of this process is", True),
        (MemoryError(), "out of host memory: MemoryError: no message; ", False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "MemoryMax=", False),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "MemoryMax=", False),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "TasksMax=", False),
        (RuntimeError("can't start new thread"), "TasksMax=", False),
        (RuntimeError("Resource temporarily unavailable"), "TasksMax=", False),  # std::thread of gloo
        (WorkersLost("rank 1 was killed by SIGKILL"), "rank 1 was killed by SIGKILL", False),
        (RuntimeError("connect refused\nat line 3"), "RuntimeError: connect refused", False),
        (RuntimeError(), "RuntimeError: no message", False),
    ],
)
def test_a_fault_is_explained(error: Exception, says: str, is_final: bool) -> None:
    why, is_cured_by_no_restart = explain(error)
    assert says in why
    assert "\n" not in why
    assert is_cured_by_no_restart is is_final
