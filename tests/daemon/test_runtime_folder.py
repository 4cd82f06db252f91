from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xditd.daemon.runtime_folder import RuntimeFolder
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import AlreadyRunning, BadRequest, NotPermitted


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RuntimeDir]:
    monkeypatch.chdir(tmp_path)  # relative paths keep sockets short
    mask = os.umask(0o022)
    yield RuntimeDir(Path("run"))
    os.umask(mask)


def test_folder_is_made_private(runtime: RuntimeDir) -> None:
    with RuntimeFolder(runtime):
        assert runtime.path.stat().st_mode & 0o777 == 0o700
        assert runtime.lock.read_text() == f"{os.getpid()}\n"


def test_what_a_dead_daemon_left_is_removed(runtime: RuntimeDir) -> None:
    runtime.path.mkdir(mode=0o700)
    stale = [runtime.client_socket, runtime.worker_socket, runtime.path / "group-1", runtime.path / "group-2"]
    kept = runtime.path / "daemon.log"
    for path in (*stale, kept):
        path.touch()
    with RuntimeFolder(runtime):
        assert not [path for path in stale if path.exists()]
        assert kept.exists()
        runtime.client_socket.touch()
    assert not runtime.client_socket.exists()


def test_second_holder_is_refused_with_the_pid_of_the_first(runtime: RuntimeDir) -> None:
    with RuntimeFolder(runtime):
        runtime.client_socket.touch()
        with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
            RuntimeFolder(runtime)
        assert runtime.client_socket.exists()
    with RuntimeFolder(runtime):
        pass


def test_lock_ends_with_its_process(runtime: RuntimeDir) -> None:
    program = (
        "import os, sys; from pathlib import Path; from xditd.daemon.runtime_folder import RuntimeFolder; "
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
    with pytest.raises(BadRequest, match="lock"):
        RuntimeFolder(runtime)
    assert victim.read_text() == "keep me"


def test_path_that_no_socket_address_holds_is_refused() -> None:
    with pytest.raises(BadRequest, match="at most 107"):
        RuntimeFolder(RuntimeDir(Path("/tmp") / ("x" * 120)))
