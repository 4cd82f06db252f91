"""``xditd doctor`` with a real daemon."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from xditd.client.cli.main import main


def examine(daemon: Any, capsys: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main(["doctor", "--quick", "--json", "--runtime-dir", str(daemon.runtime.path)])
    return code, {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}


def test_sound_daemon_passes_with_its_memory_check(shared_daemon: Any, client: Any, capsys: Any) -> None:
    code, found = examine(shared_daemon, capsys)
    assert code == 0
    assert found["memory check"]["verdict"] == "ok"
    assert found["worker group"]["detail"] == "ready, 2 on cpu"
    assert f"pid {shared_daemon.process.pid}" in found["daemon"]["detail"]
    assert found["runtime folder"]["verdict"] == "ok"
    assert found["layout in use"]["detail"].startswith("ulysses=2: ")
    assert any(note.startswith("not ring=2: ") for note in found["layout in use"]["notes"])
    assert not [check for check in found if check.startswith("layout for ")]


def test_layout_that_was_asked_for_is_in_use(start_daemon: Any, capsys: Any) -> None:
    daemon = start_daemon("--layout", "ring=2")
    daemon.ready_client()
    _, found = examine(daemon, capsys)
    assert found["layout in use"]["detail"] == "ring=2: ring=2 as asked (asked for: ring=2)"
    assert "not ulysses=2: ring=2 was asked for" in found["layout in use"]["notes"]


def test_daemon_without_workers_fails_with_the_reason(start_daemon: Any, capsys: Any) -> None:
    daemon = start_daemon(worker_flags=["--exit-status", "2"])
    daemon.client().wait_status(lambda status: status.group_state.value == "given_up")
    code, found = examine(daemon, capsys)
    assert code == 1
    assert "warp: not installed" in found["worker group"]["detail"]
    assert "memory check" not in found


def test_no_daemon_is_a_warning_and_open_folder_a_failure(start_daemon: Any, capsys: Any) -> None:
    daemon = start_daemon()
    daemon.ready_client()
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait()
    code, found = examine(daemon, capsys)
    assert (code, found["daemon"]["verdict"]) == (0, "warn")
    os.chmod(daemon.runtime.path, 0o755)
    code, found = examine(daemon, capsys)
    assert code == 1
    assert found["runtime folder"]["remedy"] == f"chmod 700 {daemon.runtime.path}"


def test_remedies_are_written_for_people(start_daemon: Any, folder: Any, capsys: Any) -> None:
    assert main(["doctor", "--quick", "--runtime-dir", str(folder / "none")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("CHECK")
    assert "remedies\n" in out
    assert "daemon: xditd serve" in out
