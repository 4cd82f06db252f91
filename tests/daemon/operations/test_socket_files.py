from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from xditd.daemon.operations.runtime_folder import HeldFile
from xditd.daemon.operations.socket_files import listen_at, remove_stale, storage_error, who_listens
from xditd.ipc.errors import AlreadyRunning, BadRequest, StorageError


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="xditd-") as folder:
        yield Path(folder) / "s"


def test_listener_is_private_and_does_not_block(path: Path) -> None:
    with listen_at(path) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        assert not listener.getblocking()
        assert not listener.get_inheritable()
        assert who_listens(path) == os.getpid()


def test_a_live_socket_is_not_taken_over(path: Path) -> None:
    with listen_at(path):
        with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
            listen_at(path)
        assert who_listens(path) == os.getpid()


def test_a_socket_whose_queue_is_full_is_live(path: Path) -> None:
    with listen_at(path) as listener:
        listener.listen(0)
        assert who_listens(path) == os.getpid()  # waits in the queue, which has room for one
        assert who_listens(path) == 0
        with pytest.raises(AlreadyRunning):
            remove_stale(path)


def test_a_stale_socket_is_taken_over(path: Path) -> None:
    listen_at(path).close()
    assert who_listens(path) is None
    with listen_at(path):
        assert who_listens(path) == os.getpid()


def test_another_kind_of_file_is_kept(path: Path) -> None:
    path.write_text("keep me")
    with pytest.raises(BadRequest, match="another kind of file"):
        listen_at(path)
    assert path.read_text() == "keep me"


def test_a_folder_that_is_gone(path: Path) -> None:
    with pytest.raises(StorageError, match=r"No such file or directory; choose another runtime folder"):
        listen_at(path.parent / "gone" / "s")


def test_a_file_is_known_by_its_inode(path: Path) -> None:
    path.touch()
    held = HeldFile(path)
    assert held.is_in_place()
    path.unlink()
    assert not held.is_in_place()
    path.touch()  # the number of the inode cannot be used again while it is held
    assert not held.is_in_place()
    held.remove()
    assert path.exists()
    held.close()
    again = HeldFile(path)
    again.remove()
    assert not path.exists()
    again.close()


def test_want_of_descriptors_is_no_fault_of_the_folder(path: Path) -> None:
    error = storage_error(f"socket {path}", OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert "the hard limit of this process is" in error.detail
    assert "choose another runtime folder" not in error.detail
