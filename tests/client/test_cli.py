"""The ``xditd`` command: exit codes, stdout, and flags with their variables."""

import json
import logging
import subprocess
import sys
import time

import pytest

from xditd import __version__
from xditd.client.cli import exits, flags, tables
from xditd.client.cli.main import VERBS, build_parser, main
from xditd.ipc.errors import BadRequest, Busy, DaemonUnreachable
from xditd.ipc.replies import LogLines, Stopping
from xditd.ipc.requests import GetLogs, Stop
from xditd.ipc.tensors import CopiedBytes


def test_python_m_xditd_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "xditd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"xditd {__version__}\n"


@pytest.mark.parametrize("verb", ["status", "logs", "stop"])
def test_without_a_daemon_a_verb_exits_with_3(verb, folder, capsys):
    assert main([verb, "--runtime-dir", str(folder)]) == exits.UNREACHABLE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"xditd {verb}: daemon_unreachable: socket {folder}/daemon.sock: no such socket" in captured.err
    assert "xditd serve" in captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "VERB"),
        (["paint"], "invalid choice"),
        (["generate"], "--transformer FILE is needed"),
        (["generate", "--transformer", "t"], "one of --embeds FILE and --random-embeds SEED is needed"),
        (["generate", "--transformer", "t", "--random-embeds", "1", "--embeds", "e"], "are both given; leave one out"),
        (["generate", "--transformer", "t", "--random-embeds", "1"], "without both nothing is written"),
        (["generate", "--size", "0x64"], "sides are from 1 pixel to 8192"),
        (["demo", "--size", "100x64"], "sides are multiples of 16 pixels"),
        (["generate", "--size", "big"], "use WIDTHxHEIGHT"),
        (["generate", "--guidance", "much"], "'much': use a number from 0 to 1000"),
        (["generate", "--step-cache", "nan"], "'nan': use a number from 0 to 1"),
        (["generate", "--steps", "0"], "use a whole number from 1 to 1000"),
        (["demo", "--workers", "3"], "use a whole number from 1 to 2"),
        (["demo", "--device", "tpu"], "use auto, cuda or cpu"),
        (["status", "--js"], "unrecognized arguments"),
        (["wait", "--for", "godot"], "use workers or daemon"),
    ],
)
def test_misuse_exits_with_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == exits.MISUSE
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


USAGE_ERRORS = [
    [["--jsno"]],
    [["statsu"]],
    *([[verb, "--no-such-flag"]] for verb in sorted(set(VERBS) - {"serve"})),
    [["generate", "--sise", "64x64"]],
    [["generate"]],
    [["generate", "a cat"]],
    [["models", "add"]],
    [["models", "sort"]],
    [["adopt"]],
    [["top", "--every"]],
    [["cluster", "submit"]],
    [["completion", "tcsh"]],
]


@pytest.mark.parametrize("given", [each for (each,) in USAGE_ERRORS], ids=" ".join)
def test_a_usage_error_is_two_lines_and_the_second_says_where_to_read_on(given, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == exits.MISUSE
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    program = first.partition(": error: ")[0]
    assert program.split()[1:] == [word for word in given if word in ("add", *VERBS)][: len(program.split()) - 1]
    assert second == f"try '{program} --help'"
    wrong = next((word for word in given if word.startswith("-")), given[-1] if given[0] not in VERBS else "")
    assert wrong in first
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["generate", "a cat"], {"WARNING"}),
        (["generate", "a cat", "-v"], {"WARNING", "INFO"}),
        (["generate", "a cat", "--verbose", "--log-level", "debug"], {"WARNING", "INFO", "DEBUG"}),
        (["generate", "a cat", "--log-level", "error"], set()),
        (["demo"], {"WARNING"}),
    ],
)
def test_lines_below_warning_reach_the_terminal_only_if_asked_for(arguments, shown, monkeypatch, capsys):
    parsed = build_parser().parse_args(arguments)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    logging.Logger.manager._clear_cache()
    exits.configure_logging(parsed.log_level, parsed.verbose)
    for name in ("xditd.client.session", "urllib3.connectionpool"):
        for level in (logging.WARNING, logging.INFO, logging.DEBUG):
            logging.getLogger(name).log(level, "said by %s", name)
    said = capsys.readouterr().err.splitlines()
    assert {line.split()[1] for line in said} == shown
    assert len(said) == 2 * len(shown)


def test_errors_have_their_exit_codes():
    assert exits.code_for(DaemonUnreachable("x")) == exits.UNREACHABLE
    assert exits.code_for(BadRequest("x")) == exits.MISUSE
    assert exits.code_for(Busy("x")) == exits.FAILED


def test_variables_set_defaults_and_flags_override_them(monkeypatch):
    monkeypatch.setenv("XDITD_STEPS", "5")
    monkeypatch.setenv("XDITD_JSON", "1")
    assert build_parser().parse_args(["generate"]).steps == 5
    assert build_parser().parse_args(["generate"]).json is True
    assert build_parser().parse_args(["generate", "--steps", "7"]).steps == 7


@pytest.mark.parametrize(("variable", "value"), [("XDITD_STEPS", "many"), ("XDITD_JSON", "perhaps")])
def test_a_bad_variable_is_misuse(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["generate"])
    assert ended.value.code == exits.MISUSE
    assert value in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "arguments", "program"),
    [
        ("XDITD_JSON", ["status"], "xditd status: error"),
        ("XDITD_FOLLOW", ["logs"], "xditd logs: error"),
        ("XDITD_FOLLOW", ["status"], ""),
        ("XDITD_CHECK", ["logs"], ""),
        ("XDITD_JSON", ["status", "--json"], ""),
    ],
)
def test_a_bad_switch_is_misuse_of_the_verb_that_has_it(monkeypatch, capsys, variable, arguments, program):
    monkeypatch.setenv(variable, "perhaps")
    if not program:
        build_parser().parse_args(arguments)
        return
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(arguments)
    assert ended.value.code == exits.MISUSE
    said = capsys.readouterr().err
    assert program in said
    assert f"{variable}='perhaps': use 1 or 0" in said


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"serve"}))
def test_help_has_examples_and_names_a_variable_for_each_flag(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    options = text[text.index("options:") : text.index("examples:")]
    given = options.split("\n  -")[1:]
    assert given
    for option in given:
        assert option.startswith("h, --help") or "[XDITD_" in option, option
    assert f"xditd {verb}" in text[text.index("examples:") :]
    assert "exit status: 0 done, 1 failed, 2 misuse, 3 daemon not reachable, 130 interrupted" in text


def test_logs_show_the_last_lines(daemon, folder, capsys):
    daemon.answers[GetLogs] = lambda request: [
        LogLines(request_id=request.request_id, lines=("one", "two", "three"), next_line=3)
    ]
    assert main(["logs", "--runtime-dir", str(folder), "-n", "2"]) == exits.DONE
    assert capsys.readouterr().out == "two\nthree\n"
    assert main(["logs", "--runtime-dir", str(folder), "-n", "0"]) == exits.DONE
    assert capsys.readouterr().out == ""


def test_logs_are_followed_until_an_interrupt(daemon, folder, capsys, monkeypatch):
    polls = []

    def answer(request):
        polls.append(request.after_line)
        return [LogLines(request_id=request.request_id, lines=(f"line {len(polls)}",), next_line=len(polls))]

    def interrupt_after_two(_):
        if len(polls) == 3:
            raise KeyboardInterrupt

    daemon.answers[GetLogs] = answer
    monkeypatch.setattr(time, "sleep", interrupt_after_two)
    assert main(["logs", "-f", "--runtime-dir", str(folder)]) == exits.INTERRUPTED
    assert capsys.readouterr().out == "line 1\nline 2\nline 3\n"
    assert polls == [0, 1, 2]


def test_stop_fails_if_the_daemon_does_not_exit(daemon, folder, capsys):
    daemon.answers[Stop] = lambda request: [Stopping(request_id=request.request_id)]
    assert main(["stop", "--runtime-dir", str(folder), "--deadline-s", "1", "--json"]) == exits.FAILED
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "deadline_exceeded"
    assert "has not exited within 1 s" in captured.err


def test_a_reader_that_exits_early_causes_no_traceback(daemon, folder):
    daemon.answers[GetLogs] = lambda request: [
        LogLines(request_id=request.request_id, lines=("x" * 1000,) * 500, next_line=500)
    ]
    command = f"{sys.executable} -c 'import sys; from xditd.client.cli.main import main; sys.exit(main())'"
    piped = f"{command} logs --runtime-dir {folder} | head -n 1"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""


def test_serve_replaces_its_process_by_the_daemon(folder):
    command = [sys.executable, "-c", "from xditd.client.cli.main import main; main()", "serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert "--queue-limit" in done.stdout
    assert "XDITD_RUNTIME_DIR" in done.stdout


@pytest.mark.parametrize(("text", "expected"), [("64x128", (64, 128)), ("1024X768", (1024, 768))])
def test_sizes_are_width_then_height(text, expected):
    assert flags.size()(text) == expected


def test_sizes_and_durations_are_formatted():
    assert tables.size_text(512) == "512 B"
    assert tables.size_text(22 * 2**30) == "22.0 GiB"
    assert tables.span_text(0.0125) == "12 ms"
    assert tables.span_text(90) == "90.0 s"
    assert tables.span_text(150) == "2 min 30 s"
    assert tables.copied_text(CopiedBytes()) == "nothing"
    assert tables.copied_text(CopiedBytes(peer=1024, host_to_device=2048)) == "2.0 KiB host to device, 1.0 KiB peer"
