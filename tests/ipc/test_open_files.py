from __future__ import annotations

import errno

import pytest
import zmq

from xditd.ipc.open_files import describe_limit, is_want_of_descriptors


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "x"),
        OSError(errno.ENFILE, "x"),
        zmq.ZMQError(errno.EMFILE),
        RuntimeError("[enforce fail at loop.cc:48] rv != -1. pipe: Too many open files"),
        ImportError("libtorch.so: cannot open shared object file: Too many open files"),
    ],
)
def test_it_is_known_however_it_shows(error: Exception) -> None:
    assert is_want_of_descriptors(error)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), RuntimeError("no such interface"), MemoryError()])
def test_other_errors_are_something_else(error: Exception) -> None:
    assert not is_want_of_descriptors(error)


def test_the_limit_and_the_remedy_are_named(no_free_fd) -> None:
    text = describe_limit()
    assert "ulimit -Hn" in text
    assert "LimitNOFILE=" in text
    no_free_fd()
    with pytest.raises(OSError, match="Too many open files") as caught, open("/dev/null", "rb"):
        pass
    assert is_want_of_descriptors(caught.value)
