"""Descriptors of another process are opened only if the process and the descriptor are still the same."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xditd.ipc.errors import NotPermitted, OutOfMemory, ProcessGone, StaleSource
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.transports import descriptors
from xditd.ipc.transports.descriptors import open_descriptor


@pytest.fixture
def me() -> ProcessIdentity:
    return identify(os.getpid())


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_the_same_file_is_opened_with_a_position_of_its_own(me: ProcessIdentity, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123")
    with path.open("rb") as file:
        file.read(2)
        opened = open_descriptor(me, file.fileno(), is_writable=False, what="x")
        try:
            assert os.read(opened, 4) == b"0123"
            assert not os.get_inheritable(opened)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(opened, b"x")
        finally:
            os.close(opened)


def test_a_closed_descriptor(me: ProcessIdentity) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    with pytest.raises(StaleSource, match=f"no descriptor {fd} any more"):
        open_descriptor(me, fd, is_writable=False, what="x")


def test_a_socket_cannot_be_opened(me: ProcessIdentity) -> None:
    import socket

    with socket.socket() as server, pytest.raises(StaleSource, match="thing"):
        open_descriptor(me, server.fileno(), is_writable=False, what="thing")


def test_a_pipe_without_a_writer_does_not_block(me: ProcessIdentity, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    opened = open_descriptor(me, fd, is_writable=False, what="x")
    assert stat.S_ISFIFO(os.fstat(opened).st_mode)  # whoever asked looks at what it got
    os.close(opened)
    os.close(fd)


def test_a_process_with_another_start_time(me: ProcessIdentity) -> None:
    other = ProcessIdentity(pid=me.pid, start_ticks=me.start_ticks + 1)
    with pytest.raises(ProcessGone, match="pid was reused"):
        open_descriptor(other, 0, is_writable=False, what="x")


def test_a_process_that_was_killed(child: subprocess.Popen[bytes]) -> None:
    identity = identify(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    for _ in range(2):  # as a zombie, then reaped
        with pytest.raises(ProcessGone):
            open_descriptor(identity, 0, is_writable=False, what="x")
        child.wait()


def test_a_process_that_dies_while_its_descriptor_is_opened(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, open_fds: Callable[[], int]
) -> None:
    identity = identify(child.pid)
    looks = 0

    def kill_before_the_second_look(pid: int) -> ProcessIdentity:
        nonlocal looks
        looks += 1
        if looks == 2:
            child.kill()
            child.wait()
        return identify(pid)

    monkeypatch.setattr(descriptors, "identify", kill_before_the_second_look)
    before = open_fds()
    with pytest.raises(ProcessGone):
        open_descriptor(identity, 0, is_writable=False, what="x")
    assert looks == 2
    assert open_fds() == before


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_a_process_of_another_user() -> None:
    program = (
        "import os, sys\n"
        "from xditd.ipc.processes import identify\n"
        "from xditd.ipc.transports.descriptors import open_descriptor\n"
        "from xditd.ipc.errors import NotPermitted\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: open_descriptor(identify(int(sys.argv[1])), 0, is_writable=False, what='x')\n"
        "except NotPermitted as error: print(error.detail)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(os.getpid())], capture_output=True, text=True, check=True, timeout=30
    )
    assert "same user" in done.stdout
    assert NotPermitted.code == "not_permitted"


def test_no_descriptor_left_on_this_side(me: ProcessIdentity, no_free_fd: Callable[[], None]) -> None:
    """That is a lack of memory here, not an error of the client."""
    no_free_fd()
    with pytest.raises(OutOfMemory):
        open_descriptor(me, 0, is_writable=False, what="x")


def test_a_terminal_does_not_become_ours(tmp_path: Path) -> None:
    """A worker that leads a session would be sent the signals of whatever terminal a client names."""
    program = (
        "import os\n"
        "from xditd.ipc.processes import identify\n"
        "from xditd.ipc.transports.descriptors import open_descriptor\n"
        "main, terminal = os.openpty()\n"
        "open_descriptor(identify(os.getpid()), terminal, is_writable=True, what='x')\n"
        "try: os.open('/dev/tty', os.O_RDWR)\n"
        "except OSError: print('none')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, start_new_session=True, check=True, timeout=30
    )
    assert done.stdout == "none\n"
    assert signal.SIGHUP  # what such a terminal would send when it closes
