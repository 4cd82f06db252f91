"""A runtime folder from which another program removes files is restored, or the daemon ends with the reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.replies import Generated, StepDone, Stopping
from xditd.ipc.requests import Stop
from xditd.ipc.status import GroupState

FAKE_WORKERS = Path(__file__).resolve().parent.parent / "fake_workers.py"
MENDED_S = 60.0
"""For a busy machine; the daemon checks every second."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def remove(folder: Path) -> None:
    """Replace in one step: the daemon may check at any time."""
    folder.rename(folder.with_name("removed"))
    shutil.rmtree(folder.with_name("removed"))


def test_a_removed_folder_is_made_again(start_daemon: Any, memory: Any, wait_until: Any) -> None:
    daemon = start_daemon("--metrics", "unix")
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    running = client.send(memory.generate(lent.component_id, steps=100))
    client.wait_event(running, StepDone)
    remove(daemon.runtime.path)
    everything = {"daemon.sock", "workers.sock", "metrics.sock", "daemon.lock"}
    wait_until(lambda: names(daemon.runtime.path) >= everything, MENDED_S)
    assert isinstance(client.wait(running), Generated)  # existing connections stay
    assert daemon.client().status().pid == daemon.process.pid
    with socket.socket(socket.AF_UNIX) as scraper:
        scraper.connect(str(daemon.runtime.metrics_socket))
        scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert scraper.recv(8) == b"HTTP/1.0"
    os.kill(client.status().workers[0].pid, signal.SIGKILL)  # rebuilt workers can connect, too
    client.wait_status(lambda status: status.counters.group_starts == 2 and status.group_state is GroupState.READY)
    daemon.client().ask(Stop(request_id=""), Stopping)
    assert daemon.wait() == 0
    assert "restored: run, daemon.lock, workers.sock, daemon.sock, metrics.sock" in daemon.log
    assert names(daemon.runtime.path) == {"daemon.lock", "fake-starts"}


def test_a_folder_removed_while_the_workers_start(start_daemon: Any, wait_until: Any) -> None:
    daemon = start_daemon(worker_flags=["--late-s", "1"])
    wait_until(lambda: "fake leader start=1" in daemon.log)
    remove(daemon.runtime.path)
    wait_until(daemon.runtime.client_socket.exists, MENDED_S)
    assert daemon.ready_client().status().counters.group_starts == 1


def test_a_folder_that_was_opened_to_others_is_private_again(start_daemon: Any, wait_until: Any) -> None:
    daemon = start_daemon()
    client = daemon.ready_client()
    daemon.runtime.path.chmod(0o755)
    wait_until(lambda: daemon.runtime.path.stat().st_mode & 0o777 == 0o700, MENDED_S)
    assert client.status().pid == daemon.client().status().pid == daemon.process.pid
    assert f"runtime folder {daemon.runtime.path}: its mode was changed to 0755; it is 0700 again" in daemon.log


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_that_was_given_away_ends_the_daemon(start_daemon: Any) -> None:
    daemon = start_daemon()
    daemon.ready_client()
    os.chown(daemon.runtime.path, 12345, -1)
    try:
        assert daemon.wait() == 1
        assert f"runtime folder {daemon.runtime.path}: owned by uid 12345, not 0; choose another" in daemon.log
        assert "Traceback" not in daemon.log
    finally:
        os.chown(daemon.runtime.path, 0, -1)


def test_one_removed_file_is_made_again(start_daemon: Any, wait_until: Any) -> None:
    daemon = start_daemon()
    daemon.client()
    daemon.runtime.client_socket.unlink()
    wait_until(daemon.runtime.client_socket.exists, MENDED_S)
    daemon.client().status()
    daemon.process.terminate()
    assert daemon.wait() == 0
    assert "restored: daemon.sock" in daemon.log


def test_a_second_daemon_is_refused_although_the_lock_was_removed(start_daemon: Any) -> None:
    first = start_daemon()
    client = first.ready_client()
    first.runtime.lock.unlink()
    second = start_daemon()
    assert second.wait() == 1
    assert f"another daemon (pid {first.process.pid})" in second.log
    assert "Traceback" not in second.log
    first.client().status()
    client.status()


def test_a_daemon_whose_folder_another_one_has_taken_ends(start_daemon: Any, folder: Path) -> None:
    first = start_daemon()
    client = first.ready_client()
    first.process.send_signal(signal.SIGSTOP)  # it would be the first to make the folder again
    first.runtime.path.rename(folder / "elsewhere")
    second = start_daemon()
    second.ready_client()
    first.process.send_signal(signal.SIGCONT)
    assert first.wait() == 1
    assert f"another daemon (pid {second.process.pid}) holds it" in first.log
    client.close()
    second.client().status()  # nothing of the second one's was removed


def test_a_folder_that_cannot_be_made_again_ends_the_daemon(start_daemon: Any) -> None:
    daemon = start_daemon()
    daemon.ready_client()
    daemon.process.send_signal(signal.SIGSTOP)
    remove(daemon.runtime.path)
    daemon.runtime.path.write_text("in the way")
    daemon.process.send_signal(signal.SIGCONT)
    assert daemon.wait() == 1
    assert "exists and is not a folder" in daemon.log
    assert "Traceback" not in daemon.log
    assert daemon.runtime.path.read_text() == "in the way"


@pytest.fixture
def activated(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon with socket activation."""
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    (folder / "xditd.toml").write_text(f"[workers]\ncommand = {json.dumps([sys.executable, str(FAKE_WORKERS)])}\n")
    word = [sys.executable, "-m", "xditd.daemon", "--config", folder / "xditd.toml", "--runtime-dir", runtime]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime / "daemon.sock"))
        listener.listen()
        start = f'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&{listener.fileno()}'
        with (folder / "daemon.log").open("wb") as log:
            daemon = subprocess.Popen(
                ["bash", "-c", start, "bash", *map(str, word)], pass_fds=[listener.fileno()], stderr=log
            )
    yield daemon
    if daemon.poll() is None:
        daemon.terminate()
    daemon.wait(20)


def test_a_service_managers_socket_that_is_gone_ends_the_daemon(activated: Any, folder: Path, wait_until: Any) -> None:
    """Only the service manager can restore the socket: the daemon ends with that message."""
    wait_until(lambda: {"workers.sock", "fake-starts"} <= names(folder / "run"))  # it serves
    (folder / "run" / "daemon.sock").unlink()
    assert activated.wait(20) == 1
    assert "systemctl --user restart xditd.socket" in (folder / "daemon.log").read_text()
    assert names(folder / "run") <= {"daemon.lock", "fake-starts"}


TINY = 'mount -t tmpfs -o {options} tmpfs "$1" && {spoil} shift && exec "$@"'
FULL = TINY.format(options="size=4k,mode=700", spoil='! head -c 64k /dev/zero > "$1/full" 2>/dev/null &&')
NO_INODES = TINY.format(options="nr_inodes=1,mode=700", spoil="")
READ_ONLY = TINY.format(options="ro,mode=700", spoil="")


@pytest.mark.parametrize(
    ("script", "words"),
    [(FULL, "No space left on device"), (NO_INODES, "No space left on device"), (READ_ONLY, "Read-only file system")],
    ids=["full", "no inodes", "read-only"],
)
def test_a_folder_without_room(folder: Path, script: str, words: str) -> None:
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    word = ["sh", "-c", script, "sh", str(runtime), sys.executable, "-m", "xditd.daemon", "--runtime-dir", str(runtime)]
    done = subprocess.run(["unshare", "-rm", *word], capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("needs a mount namespace of its own")
    assert done.returncode == 1
    assert words in done.stderr
    assert "runtime folder (--runtime-dir or XDITD_RUNTIME_DIR)" in done.stderr
    assert "Traceback" not in done.stderr


MOUNTED = 'mount -t tmpfs -o size=1m,mode=700 tmpfs "$1" && shift && exec "$@"'
READ_ONLY_FROM_NOW_ON = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/new" 2>/dev/null'
FILL = 'head -c 2m /dev/zero > "$1/full" 2>/dev/null; test -s "$1/full"'


@pytest.mark.skipif(os.getuid() != 0, reason="a daemon in a user namespace of its own sees clients as another user's")
@pytest.mark.parametrize("spoil", [FILL, READ_ONLY_FROM_NOW_ON], ids=["full", "read-only"])
def test_a_folder_without_room_while_it_runs(
    start_daemon: Any, folder: Path, memory: Any, wait_until: Any, spoil: str
) -> None:
    """Nothing is written to it after the start: jobs run, clients come, and an ended group is rebuilt."""
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace may be made here")
    daemon = start_daemon(before=["unshare", "-m", "sh", "-c", MOUNTED, "sh", str(runtime)])
    wait_until(lambda: "daemon listening" in daemon.log)
    inside = ["nsenter", "-t", str(daemon.process.pid), "-m"]
    daemon.runtime = RuntimeDir(Path(f"/proc/{daemon.process.pid}/root{runtime}"))
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    subprocess.run([*inside, "sh", "-c", spoil, "sh", str(runtime)], check=True)
    os.kill(client.status().workers[0].pid, signal.SIGKILL)
    client.wait_status(lambda status: status.counters.group_starts == 2 and status.group_state is GroupState.READY)
    client.ask(memory.generate(lent.component_id), Generated)
    assert daemon.client().status().pid == daemon.process.pid
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert "Traceback" not in daemon.log
    assert ("daemon.sock stays: Read-only file system" in daemon.log) is (spoil == READ_ONLY_FROM_NOW_ON)
