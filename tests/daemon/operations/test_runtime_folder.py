from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xditd.daemon.operations import runtime_folder
from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.runtime_folder import MAX_FAILURES, FolderWatch, RuntimeFolder
from xditd.daemon.operations.socket_files import listen_at, who_listens
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import AlreadyRunning, BadRequest, NotPermitted, StorageError, XditdError

Listen = Callable[[RuntimeFolder], None]


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeDir:
    monkeypatch.chdir(tmp_path)  # relative paths keep sockets short
    return RuntimeDir(Path("run"))


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Listen on both sockets until the test ends."""
    kept: list[socket.socket] = []

    def start(folder: RuntimeFolder) -> None:
        folder.listen(folder.runtime.worker_socket, kept.append)
        folder.listen(folder.runtime.client_socket, kept.append)

    yield start
    for listener in kept:
        listener.close()


def is_listening(path: Path) -> bool:
    return who_listens(path) == os.getpid()


def test_folder_is_made_private(runtime: RuntimeDir) -> None:
    with RuntimeFolder(runtime):
        assert runtime.path.stat().st_mode & 0o777 == 0o700
        assert runtime.lock.read_text() == f"{os.getpid()}\n"


def test_what_a_dead_daemon_left_is_removed_and_nothing_else(runtime: RuntimeDir, listen: Listen) -> None:
    runtime.path.mkdir(mode=0o700)
    for path in (runtime.client_socket, runtime.worker_socket):
        listen_at(path).close()
    kept = [runtime.path / "daemon.log", runtime.path / "group-photo.jpg"]
    for path in kept:
        path.touch()
    with RuntimeFolder(runtime) as folder:
        listen(folder)
        assert is_listening(runtime.client_socket)
        assert is_listening(runtime.worker_socket)
    assert sorted(runtime.path.iterdir()) == sorted([*kept, runtime.lock])


def test_a_file_in_the_place_of_a_socket_is_refused(runtime: RuntimeDir) -> None:
    runtime.path.mkdir(mode=0o700)
    runtime.worker_socket.write_text("keep me")
    with pytest.raises(BadRequest, match="another kind of file"):
        RuntimeFolder(runtime)
    assert runtime.worker_socket.read_text() == "keep me"


def test_second_holder_is_refused_with_the_pid_of_the_first(runtime: RuntimeDir, listen: Listen) -> None:
    with RuntimeFolder(runtime) as folder:
        listen(folder)
        with pytest.raises(AlreadyRunning, match=rf"pid {os.getpid()}\) holds it"):
            RuntimeFolder(runtime)
        assert is_listening(runtime.client_socket)
    with RuntimeFolder(runtime):
        pass


def test_a_refusal_leaves_no_descriptor_behind(runtime: RuntimeDir) -> None:
    with RuntimeFolder(runtime):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(AlreadyRunning):
                RuntimeFolder(runtime)
        assert len(os.listdir("/proc/self/fd")) == before


def test_second_holder_is_refused_although_the_lock_was_removed(runtime: RuntimeDir, listen: Listen) -> None:
    with RuntimeFolder(runtime) as folder:
        listen(folder)
        runtime.lock.unlink()
        with pytest.raises(AlreadyRunning, match=rf"pid {os.getpid()}\) listens there"):
            RuntimeFolder(runtime)
        assert folder.restore() == [runtime.lock]  # the first one takes the lock again
        with pytest.raises(AlreadyRunning, match="holds it"):
            RuntimeFolder(runtime)


@pytest.mark.parametrize("harm", ["client_socket", "worker_socket", "lock", "everything", "the folder"])
def test_what_was_removed_is_made_again(runtime: RuntimeDir, listen: Listen, harm: str) -> None:
    with RuntimeFolder(runtime) as folder:
        listen(folder)
        assert folder.restore() == []
        if harm == "the folder":
            shutil.rmtree(runtime.path)
        else:
            names = ["client_socket", "worker_socket", "lock"] if harm == "everything" else [harm]
            for name in names:
                getattr(runtime, name).unlink()
        assert folder.restore()
        assert runtime.path.stat().st_mode & 0o777 == 0o700
        assert runtime.lock.read_text() == f"{os.getpid()}\n"
        assert is_listening(runtime.client_socket)
        assert is_listening(runtime.worker_socket)
        assert folder.restore() == []
    assert list(runtime.path.iterdir()) == [runtime.lock]


def test_a_folder_that_another_daemon_has_taken_is_left_to_it(runtime: RuntimeDir, listen: Listen) -> None:
    with contextlib.ExitStack() as until_the_end_of_the_first:
        first = until_the_end_of_the_first.enter_context(RuntimeFolder(runtime))
        listen(first)
        runtime.path.rename("elsewhere")
        with RuntimeFolder(runtime) as second:
            listen(second)
            with pytest.raises(AlreadyRunning, match="holds it"):
                first.restore()
            until_the_end_of_the_first.close()
            assert is_listening(runtime.client_socket)
            assert is_listening(runtime.worker_socket)
            assert second.restore() == []


def test_a_folder_that_became_somebody_elses_is_not_entered(runtime: RuntimeDir, tmp_path: Path) -> None:
    with RuntimeFolder(runtime) as folder:
        runtime.path.rename("elsewhere")
        (tmp_path / "trap").mkdir(mode=0o700)
        runtime.path.symlink_to(tmp_path / "trap")
        with pytest.raises(BadRequest, match="a link"):
            folder.restore()
        assert not list((tmp_path / "trap").iterdir())


def test_a_service_managers_socket_is_not_made_again(runtime: RuntimeDir) -> None:
    runtime.path.mkdir(mode=0o700)
    with listen_at(runtime.client_socket), RuntimeFolder(runtime) as folder:
        folder.await_clients_at(runtime.client_socket)
        assert folder.restore() == []
        runtime.client_socket.unlink()
        with pytest.raises(BadRequest, match="restart the socket unit"):
            folder.restore()
        assert not runtime.client_socket.exists()


def test_lock_ends_with_its_process(runtime: RuntimeDir) -> None:
    program = (
        "import os, sys; from pathlib import Path; from xditd.daemon.operations.runtime_folder import RuntimeFolder; "
        "from xditd.ipc.addresses import RuntimeDir; RuntimeFolder(RuntimeDir(Path('run'))); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=20, check=False).returncode == -9
    with RuntimeFolder(runtime):
        pass


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_folder_that_others_may_enter_is_refused(runtime: RuntimeDir, mode: int) -> None:
    runtime.path.mkdir()
    runtime.path.chmod(mode)
    with pytest.raises(NotPermitted, match="chmod 700 run"):
        RuntimeFolder(runtime)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_folder_of_somebody_else_is_refused(runtime: RuntimeDir) -> None:
    runtime.path.mkdir(mode=0o700)
    os.chown(runtime.path, 12345, -1)
    with pytest.raises(NotPermitted, match="uid 12345"):
        RuntimeFolder(runtime)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o000])
def test_a_mode_that_was_changed_is_set_again(runtime: RuntimeDir, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    """Others could enter, or not even its owner."""
    with RuntimeFolder(runtime) as folder:
        assert folder.restore() == []
        runtime.path.chmod(mode)
        assert folder.restore() == [runtime.path]
        assert runtime.path.stat().st_mode & 0o777 == 0o700
        assert f"its mode was changed to {mode:04o}" in caplog.text
        assert folder.restore() == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_that_was_given_away_is_left(runtime: RuntimeDir) -> None:
    """Its owner can put other sockets in the place of the daemon's."""
    with RuntimeFolder(runtime) as folder:
        os.chown(runtime.path, 12345, -1)
        with pytest.raises(NotPermitted, match="owned by uid 12345"):
            folder.restore()


def test_link_and_file_are_refused(runtime: RuntimeDir, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    runtime.path.symlink_to(target)
    with pytest.raises(BadRequest, match="a link"):
        RuntimeFolder(runtime)
    runtime.path.unlink()
    runtime.path.touch()
    with pytest.raises(BadRequest, match="not a folder"):
        RuntimeFolder(runtime)


def test_lock_that_is_a_link_is_refused(runtime: RuntimeDir, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    runtime.path.mkdir(mode=0o700)
    runtime.lock.symlink_to(victim)
    with pytest.raises(StorageError, match="lock"):
        RuntimeFolder(runtime)
    assert victim.read_text() == "keep me"


def test_path_that_no_socket_address_holds_is_refused() -> None:
    with pytest.raises(BadRequest, match="at most 107"):
        RuntimeFolder(RuntimeDir(Path("/tmp") / ("x" * 120)))


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[EventLoop]:
    monkeypatch.setattr(runtime_folder, "CHECK_EVERY_S", 0.001)
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RuntimeFolder]:
    with RuntimeFolder(RuntimeDir(tmp_path / "run")) as held:
        yield held


def test_a_folder_that_cannot_be_mended_is_given_up_once(loop: EventLoop, folder: RuntimeFolder) -> None:
    given_up: list[XditdError] = []
    watch = FolderWatch(loop, folder, given_up.append)
    path = folder.runtime.path
    shutil.rmtree(path)
    path.touch()
    for _ in range(MAX_FAILURES - 1):
        watch.check()
    assert not given_up
    path.unlink()
    watch.check()  # restored: the count starts again
    assert folder.runtime.lock.exists()
    shutil.rmtree(path)
    path.touch()
    for _ in range(MAX_FAILURES):
        watch.check()
    assert [error.code for error in given_up] == ["bad_request"]


def test_it_looks_again_and_again_and_says_what_it_did(
    loop: EventLoop, folder: RuntimeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    FolderWatch(loop, folder, lambda error: pytest.fail(error.detail)).begin()
    for _ in range(2):
        folder.runtime.lock.unlink()
        loop.call_later(10.0, loop.stop)  # the deadline
        loop.run(lambda: loop.stop() if folder.runtime.lock.exists() else None)
        assert folder.runtime.lock.exists()
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["runtime folder was damaged by another program; restored: daemon.lock"] * 2
