"""Standard streams that are closed, full or without a reader, errors as JSON, and misspelt names."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from xditd.client.cli import exits
from xditd.client.cli.main import VERBS, main
from xditd.client.cli.printing import error_json, json_text
from xditd.ipc.errors import Busy, Closed, DaemonUnreachable
from xditd.ipc.requests import GetLogs

XDITD = f"{sys.executable} -c 'import sys; from xditd.client.cli.main import main; sys.exit(main())'"


def shell(command):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("doctor --quick >/dev/full", exits.FAILED, "standard output: No space left on device"),
        ("--help >&-", exits.FAILED, "standard output: Bad file descriptor"),
        ("--help >/dev/full", exits.FAILED, "standard output: No space left on device"),
        ("-u --help >/dev/full", exits.FAILED, "standard output: No space left on device"),
        ("status --runtime-dir /nowhere --json >&-", exits.UNREACHABLE, "standard output: Bad file descriptor"),
        ("status --runtime-dir /nowhere 2>/dev/full", exits.UNREACHABLE, ""),
        ("status --runtime-dir /nowhere 2>&-", exits.UNREACHABLE, ""),
        ("status --runtime-dir /nowhere <&- >&- 2>&-", exits.UNREACHABLE, ""),
    ],
)
def test_streams_that_cannot_be_written_are_told_by_the_status(command, code, says):
    unbuffered = command.startswith("-u ")
    done = shell(f"{'PYTHONUNBUFFERED=1 ' * unbuffered}{XDITD} {command.removeprefix('-u ')}")
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stdout == ""  # and no text for stderr


def test_a_reader_that_leaves_has_a_status_of_its_own():
    done = shell(f"{XDITD} doctor --quick | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == f"{exits.READER_LEFT}\n"
    assert done.stderr == ""


def test_names_that_the_terminal_does_not_have_are_escaped():
    done = shell(f"PYTHONIOENCODING=ascii {XDITD} doctor --quick --runtime-dir /nowhere/größe")
    assert "/nowhere/gr\\xf6\\xdfe" in done.stdout
    assert "Traceback" not in done.stderr


OTHERS = {"serve", "doctor", "demo", "install-service", "comfyui", "generate", "cluster", "completion", "top", "models"}
"""Verbs that need no daemon, have verbs of their own, or are tested elsewhere; ``top`` has no ``--json``."""


@pytest.mark.parametrize("verb", sorted(set(VERBS) - OTHERS))
def test_a_verb_that_fails_says_so_in_json(verb, folder, capsys):
    needed = {"adopt": ["c1"], "revoke": ["c1"], "wait": ["--wait-s", "0"]}.get(verb, [])
    assert main([verb, *needed, "--runtime-dir", str(folder), "--json"]) == exits.UNREACHABLE
    found = json.loads(capsys.readouterr().out)["error"]
    assert (found["code"], found["retryable"]) == ("daemon_unreachable", True)
    assert "no such socket" in found["message"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["statsu", "--json"], "did you mean status?"),
        (["status", "--json", "--runtime-dri", "x"], "did you mean --runtime-dir?"),
        (["generate", "--json", "--steps", "0"], "use a whole number"),
        (["generate", "--json"], "--transformer FILE is needed"),
    ],
)
def test_misuse_is_json_too_where_json_was_asked_for(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == exits.MISUSE
    captured = capsys.readouterr()
    found = json.loads(captured.out)["error"]
    assert (found["code"], found["retryable"]) == ("bad_request", False)
    assert says in found["message"]
    assert says in captured.err


def test_install_service_and_comfyui_fail_in_json(tmp_path, capsys):
    for arguments in (["comfyui", "install", str(tmp_path)], ["install-service", "--user", "--system"]):
        assert main([*arguments, "--json"]) == exits.MISUSE
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "bad_request"


def test_an_unexpected_error_is_internal_and_has_a_traceback(daemon, folder, capsys, monkeypatch):
    def broken(self, after=0):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("xditd.client.client.Client.logs", broken)
    assert main(["logs", "--runtime-dir", str(folder), "--json"]) == exits.FAILED
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "internal"
    assert "please report it" in captured.err
    assert "test_cli_printing.py" in captured.err


def test_an_interrupt_is_json_too(daemon, folder, capsys):
    def interrupt(request):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return []

    daemon.answers[GetLogs] = interrupt
    assert main(["logs", "--runtime-dir", str(folder), "--json"]) == exits.INTERRUPTED
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "cancelled"


def test_json_has_no_nan():
    assert json.loads(json_text({"a": [float("nan"), {"b": (float("inf"), 1.5)}]})) == {"a": [None, {"b": [None, 1.5]}]}


def test_errors_say_whether_and_when_to_retry():
    busy = Busy("full")
    busy.retry_after_s = 2.0
    assert error_json(busy)["error"] == {"code": "busy", "message": "full", "retryable": True, "retry_after_s": 2.0}
    assert error_json(Closed("x"))["error"] == {"code": "closed", "message": "x", "retryable": False}
    assert DaemonUnreachable.retryable


def test_a_misspelt_variable_is_a_warning(folder, capsys, monkeypatch):
    monkeypatch.setenv("XDITD_RUNTIM_DIR", "/x")
    assert main(["status", "--runtime-dir", str(folder)]) == exits.UNREACHABLE
    captured = capsys.readouterr()
    assert (
        "warning: environment variable XDITD_RUNTIM_DIR: nothing reads it; did you mean XDITD_RUNTIME_DIR?"
        in captured.err
    )
    assert captured.out == ""


def test_a_demo_that_could_not_leave_its_files_ends_before_it_begins(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in ("/sys/x", str(tmp_path / "file")):
        assert main(["demo", "--out", out, "--json"]) == exits.FAILED
        captured = capsys.readouterr()
        assert json.loads(captured.out)["error"]["code"] == "output_failed"
        assert f"output folder {out}: " in captured.err
