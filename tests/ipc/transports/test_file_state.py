"""File states, which every later write changes, and digests computed in the background."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xditd.ipc.transports import file_state
from xditd.ipc.transports.file_state import SMALL_BYTES, DigestThread, FileState, digest_file, settled_stat

DEADLINE_S = 20.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 20_000)  # more than two pieces
    return path


@pytest.fixture
def fd(path: Path):
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def state_of(fd: int) -> FileState:
    return FileState.of_stat(settled_stat(fd))


def test_every_write_after_a_settled_look_moves_the_ctime(path: Path, fd: int) -> None:
    """Also one that follows at once: without settling, both would lie within one tick of the kernel's clock."""
    with path.open("r+b", buffering=0) as writer:
        for _ in range(50):
            writer.write(b"a")
            found = settled_stat(fd)
            writer.write(b"b")
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
            assert os.fstat(fd).st_ctime_ns > found.st_ctime_ns


def test_a_clock_that_is_far_ahead_is_not_waited_for(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server's clock may be ahead, so that its files have times in the future."""
    monkeypatch.setattr(file_state.time, "clock_gettime_ns", lambda clock: 0)
    monkeypatch.setattr(file_state.time, "sleep", lambda s: pytest.fail("it waits"))
    settled_stat(fd)


def test_a_file_that_has_just_changed_is_waited_for_no_longer_than_a_tick(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_ns = os.fstat(fd).st_ctime_ns
    monkeypatch.setattr(file_state.time, "clock_gettime_ns", lambda clock: changed_ns)
    began_s = time.monotonic()
    settled_stat(fd)
    assert time.monotonic() - began_s < 5.0


def test_a_digest_is_of_all_bytes(path: Path, fd: int) -> None:
    expected = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    assert digest_file(fd, path.stat().st_size) == expected
    assert digest_file(fd, 0) == hashlib.blake2b(digest_size=16).digest()


def test_what_cannot_be_digested(path: Path, fd: int) -> None:
    assert digest_file(fd, path.stat().st_size + 1) is None  # cut short: no SIGBUS, as a mapping would give
    stop = threading.Event()
    stop.set()
    assert digest_file(fd, path.stat().st_size, stop) is None
    closed = os.dup(fd)
    os.close(closed)
    assert digest_file(closed, 1) is None


def test_a_thread_finds_the_digest_of_the_state_that_it_was_given(path: Path, fd: int) -> None:
    thread = DigestThread(fd, state_of(fd), str(path))
    thread.wait()
    assert thread.is_over
    assert thread.found == digest_file(fd, path.stat().st_size)
    thread.stop()


def test_a_write_during_the_reading_leaves_no_digest(path: Path, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mtime is set back, so that nothing but the ctime tells."""
    before = state_of(fd)

    def read_and_write(fd: int, size_bytes: int, stop: threading.Event) -> bytes | None:
        found = digest_file(fd, size_bytes, stop)
        with path.open("r+b") as writer:
            writer.write(b"other")
        os.utime(path, ns=(0, before.mtime_ns))
        return found

    monkeypatch.setattr(file_state, "digest_file", read_and_write)
    thread = DigestThread(fd, before, str(path))
    thread.wait()
    assert thread.found is None


def test_a_large_file_is_read_at_idle_priority_and_stopped_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", SMALL_BYTES + 1)
    policies: list[int] = []
    begun = threading.Event()

    def wait_for_stop(fd: int, size_bytes: int, stop: threading.Event) -> None:
        policies.append(os.sched_getscheduler(threading.get_native_id()))
        begun.set()
        assert stop.wait(DEADLINE_S)

    monkeypatch.setattr(file_state, "digest_file", wait_for_stop)
    fd = os.open(tmp_path / "large", os.O_RDONLY)
    thread = DigestThread(fd, state_of(fd), "large")
    assert begun.wait(DEADLINE_S)
    assert not thread.is_over
    thread.stop()
    thread.wait()
    assert policies == [os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER  # of the thread alone
    os.close(fd)


def test_differences_are_named(fd: int) -> None:
    state = state_of(fd)
    assert state.differences(state._replace(size_bytes=1, ctime_ns=2)) == "size, ctime"


def test_no_thread_and_no_descriptor_is_left(path: Path, fd: int, open_fds: Callable[[], int]) -> None:
    before, threads = open_fds(), threading.active_count()
    for _ in range(50):
        thread = DigestThread(fd, state_of(fd), str(path))
        thread.stop()
        thread.wait()
    assert (open_fds(), threading.active_count()) == (before, threads)


def test_stopping_a_digest_does_not_wait_for_a_thread_that_gets_no_time(
    path: Path, fd: int, open_fds: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def starved(*_: object) -> None:
        begun.set()
        assert may_go_on.wait(DEADLINE_S)

    monkeypatch.setattr(file_state, "digest_file", starved)
    before = open_fds()
    thread = DigestThread(fd, state_of(fd), str(path))
    assert begun.wait(DEADLINE_S)
    stopping = threading.Thread(target=thread.stop, daemon=True)
    stopping.start()
    stopping.join(DEADLINE_S / 4)
    is_stopped = not stopping.is_alive()
    may_go_on.set()
    thread.wait()
    assert is_stopped
    assert open_fds() == before
