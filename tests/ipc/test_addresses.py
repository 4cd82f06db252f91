"""Paths of the sockets, and folders whose socket paths are too long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xditd.ipc.addresses import MAX_SOCKET_PATH_BYTES, RuntimeDir, default_runtime_dir, endpoint, parse_metrics_address
from xditd.ipc.errors import BadRequest


def test_the_session_managers_folder_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_runtime_dir() == RuntimeDir(Path("/run/user/7/xditd"))
    for value in (None, ""):
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False) if value is None else monkeypatch.setenv(
            "XDG_RUNTIME_DIR", ""
        )
        assert default_runtime_dir() == RuntimeDir(Path(f"/tmp/xditd-{os.getuid()}"))


def test_names_lie_in_the_folder_and_differ(tmp_path: Path) -> None:
    folder = RuntimeDir(tmp_path)
    names = {folder.client_socket, folder.worker_socket, folder.lock, folder.log}
    assert len(names) == 4
    assert {name.parent for name in names} == {tmp_path}
    assert endpoint(folder.client_socket) == f"ipc://{folder.client_socket}"


@pytest.mark.parametrize("letter", ["x", "é"])
def test_lengths_count_bytes_not_characters(letter: str) -> None:
    room = MAX_SOCKET_PATH_BYTES - len("//workers.sock")
    fits = "/" + letter * (room // len(letter.encode()))
    RuntimeDir(Path(fits)).check_socket_paths()
    with pytest.raises(BadRequest, match="--runtime-dir"):
        RuntimeDir(Path(fits + letter)).check_socket_paths()


def test_a_path_that_is_not_text_is_refused_by_its_bytes() -> None:
    with pytest.raises(BadRequest, match=r"xff/daemon\.sock': it is not UTF-8; choose another runtime folder"):
        RuntimeDir(Path(os.fsdecode(b"/tmp/\xff"))).check_socket_paths()


def test_the_longest_path_can_be_bound(tmp_path: Path) -> None:
    import socket

    room = MAX_SOCKET_PATH_BYTES - len(os.fsencode(tmp_path)) - 1
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / ("s" * room)))
    with socket.socket(socket.AF_UNIX) as server, pytest.raises(OSError, match="too long"):
        server.bind(str(tmp_path / ("s" * (room + 1))))


def test_the_variable_of_the_command_line_counts_for_the_library_too(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setenv("XDITD_RUNTIME_DIR", "/srv/gpu0")
    assert default_runtime_dir() == RuntimeDir(Path("/srv/gpu0"))
    monkeypatch.setenv("XDITD_RUNTIME_DIR", "here")
    assert default_runtime_dir() == RuntimeDir(Path.cwd() / "here")
    monkeypatch.setenv("XDITD_RUNTIME_DIR", "")
    assert default_runtime_dir() == RuntimeDir(Path("/run/user/7/xditd"))


def test_metrics_are_served_on_loopback_only() -> None:
    assert parse_metrics_address("127.0.0.1:9464") == ("127.0.0.1", 9464)
    assert parse_metrics_address("[::1]:0") == ("::1", 0)
    for text in ("0.0.0.0:9464", "192.168.1.2:80", "localhost:9464", "9464", "[::]:1", "127.0.0.1:99999", "127.0.0.1:"):
        with pytest.raises(ValueError, match=r"."):
            parse_metrics_address(text)
