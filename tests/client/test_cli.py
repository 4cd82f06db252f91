"""The ``xditd`` command: exit codes, stdout, and flags with their variables."""

import json
import logging
import subprocess
import sys
import time

import msgspec
import pytest
import sample_facts

from xditd import __version__
from xditd.client.cli import exits, flags, tables
from xditd.client.cli.main import VERBS, build_parser, main
from xditd.ipc.errors import BadRequest, Busy, DaemonUnreachable
from xditd.ipc.facts import ComponentFacts, ModuleFacts
from xditd.ipc.layout_choice import choose_layout, report
from xditd.ipc.replies import LogLines, Status, Stopping
from xditd.ipc.requests import GetLogs, GetStatus, Stop
from xditd.ipc.status import (
    ComponentStatus,
    Counters,
    DaemonStatus,
    ErrorStatus,
    FusedCheck,
    GroupState,
    JobState,
    JobStatus,
    LeaseState,
    LoraCounts,
    MemoryParts,
    PackedProducts,
    SplitCheck,
    WorkerStatus,
)
from xditd.ipc.tensors import ComponentKind, CopiedBytes, Tier

STATUS = DaemonStatus(
    package_version="0.1.0",
    protocol_version=2,
    pid=41,
    uptime_s=3_725.0,
    runtime_dir="/run/user/1/xditd",
    group_state=GroupState.BUSY,
    group_detail="",
    device_kind="cuda",
    world_size=2,
    parallel={"ulysses": 2},
    layout=report(choose_layout(2), {}),
    attention_backend="CUDNN",
    precision="bf16",
    fused_checks=(
        FusedCheck(
            kernels="fused FLUX.1 blocks", case="512 text + 4096 image", error=0.007, tolerance=0.02, is_used=True
        ),
        FusedCheck(kernels="fp8 FLUX.1 blocks", case="1 text + 2 image", error=None, tolerance=0.1, is_used=False),
    ),
    workers=(
        WorkerStatus(rank=0, pid=42, device="cuda:0", device_uuid="GPU-a", memory_bytes=3 * 2**30, loaded=1,
                     memory=MemoryParts(weights_bytes=2**30, graphs_bytes=2**29, reserve_bytes=2**28)),
        WorkerStatus(rank=1, pid=43, device="cuda:1", device_uuid="GPU-b", memory_bytes=0, loaded=1),
    ),
    components=(
        ComponentStatus(
            component_id="transformer-1",
            label="flux1-dev",
            kind=ComponentKind.TRANSFORMER,
            facts=sample_facts.TRANSFORMER,
            state=LeaseState.LENT,
            tiers=(Tier.CUDA_IPC,),
            lent_bytes=22 * 2**30,
            copied=CopiedBytes(peer=22 * 2**30),
            generation=0,
            owner_pid=99,
            lend_ms={"lend": 80.0},
        ),
    ),
    jobs=(
        JobStatus(
            request_id="r1", op="generate", state=JobState.RUNNING, owner_pid=99, step=3, total_steps=28,
            waited_s=0.0, ran_s=0.4,
        ),
    ),
    queue_limit=64,
    clients=2,
    counters=Counters(jobs_done=5, group_starts=1),
    last_job_ms={"steps": 1900.0},
    lent_bytes={"cuda_ipc": 22 * 2**30, "file": 2**20},
    last_errors=(ErrorStatus(age_s=75.0, where="workers", code="workers_lost", detail="rank 1\n" + "died " * 60),),
)  # fmt: skip


def answers_status(daemon):
    daemon.answers[GetStatus] = lambda request: [Status(request_id=request.request_id, daemon=STATUS)]


def test_python_m_xditd_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "xditd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"xditd {__version__}\n"


def test_status_is_a_table_for_people(daemon, folder, capsys):
    answers_status(daemon)
    assert main(["status", "--runtime-dir", str(folder)]) == exits.DONE
    out = capsys.readouterr().out
    for text in ("busy: 2 on cuda", "ulysses 2", "ulysses=2 divides the 24 attention heads", "GPU-b", "transformer-1",
                 "cuda_ipc", "22.0 GiB peer", "3/28",
                 "1 h 02 min", "5 done", "0 connections to other hosts"):  # fmt: skip
        assert text in out


def test_status_shows_the_memory_of_workers_by_part(daemon, folder, capsys):
    answers_status(daemon)
    assert main(["status", "--runtime-dir", str(folder)]) == exits.DONE
    out = capsys.readouterr().out
    (header,) = [line for line in out.splitlines() if "BEYOND WEIGHTS" in line]
    rank = out.splitlines()[out.splitlines().index(header) + 1]
    assert header.split()[:4] == ["RANK", "WEIGHTS", "SCRATCH", "GRAPHS"]
    assert " ".join(rank.split()) == "0 1.0 GiB 0 B 512.0 MiB 0 B 0 B 256.0 MiB - 768.0 MiB"


def test_status_shows_restarts_memory_by_tier_and_the_last_errors(daemon, folder, capsys):
    answers_status(daemon)
    assert main(["status", "--runtime-dir", str(folder)]) == exits.DONE
    out = capsys.readouterr().out
    assert "on loan   22.0 GiB cuda_ipc, 1.0 MiB file" in out
    assert "restarts  0 of the worker group" in out
    (line,) = [line for line in out.splitlines() if "workers_lost" in line]
    assert line.startswith("75.0 s  workers")
    assert "rank 1 died died" in line
    assert line.endswith("...")
    assert len(line) < 140


def test_status_is_json_for_programs(daemon, folder, capsys):
    answers_status(daemon)
    assert main(["status", "--runtime-dir", str(folder), "--json"]) == exits.DONE
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["group_state"] == "busy"
    (component,) = found["components"]
    assert component["copied"]["peer"] == 22 * 2**30
    assert (component["facts"]["family"], component["facts"]["transformer"]["latents"]["channels"]) == ("flux1", 16)
    assert captured.err == ""


def test_status_of_a_component_that_the_workers_do_not_know_yet(daemon, folder, capsys):
    lending = msgspec.structs.replace(STATUS.components[0], kind=None, facts=None, state=LeaseState.LENDING)
    status = msgspec.structs.replace(STATUS, components=(lending,))
    daemon.answers[GetStatus] = lambda request: [Status(request_id=request.request_id, daemon=status)]
    assert main(["status", "--runtime-dir", str(folder)]) == exits.DONE
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("transformer-1")]
    assert line[1:5] == ["flux1-dev", "-", "-", "lending"]


def test_status_shows_how_fused_kernels_compared_with_plain_modules(daemon, folder, capsys):
    answers_status(daemon)
    main(["status", "--runtime-dir", str(folder)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "fused FLUX.1 blocks 512 text + 4096 image 7.00e-03 0.02 in use" in lines
    assert "fp8 FLUX.1 blocks 1 text + 2 image not finite 0.1 refused, plain modules run" in lines
    main(["status", "--runtime-dir", str(folder), "--json"])
    checks = json.loads(capsys.readouterr().out)["fused_checks"]
    assert [(check["error"], check["is_used"]) for check in checks] == [(0.007, True), (None, False)]


def test_status_shows_how_calls_of_modules_are_split(daemon, folder, capsys):
    used = SplitCheck(
        class_name="WanModel", method="forward", split="tokens", batch=2, error=3e-7, tolerance=1e-5, is_used=True
    )
    refused = SplitCheck(
        class_name="HiDream", method="forward", batch=2, error=None, tolerance=1e-5, is_used=False, detail="why"
    )
    module = ComponentFacts(
        family="WanModel", class_name="WanModel", kind=ComponentKind.MODULE, dtype="float32", bytes_by_dtype={},
        module=ModuleFacts(methods={}, layout="tokens"),
    )  # fmt: skip
    component = msgspec.structs.replace(STATUS.components[0], kind=ComponentKind.MODULE, facts=module)
    status = msgspec.structs.replace(STATUS, split_checks=(used, refused), components=(*STATUS.components, component))
    daemon.answers[GetStatus] = lambda request: [Status(request_id=request.request_id, daemon=status)]
    main(["status", "--runtime-dir", str(folder)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "WanModel forward tokens 2 3.00e-07 1e-05 in use" in lines
    assert "HiDream forward rows 2 - 1e-05 refused: why" in lines
    layouts = [line.split()[-2] for line in lines if line.startswith("transformer-1")]
    assert layouts == ["ulysses=2,ring=1", "tokens"]


def test_status_shows_jobs_with_loras_and_why_they_take_another_path(daemon, folder, capsys):
    loras = LoraCounts(
        jobs=7, switches=6, last_switch_ms=0.084, slowest_switch_ms=0.33, detail="plain blocks run",
        forwards=140, launched=130, layouts=1, memory_bytes=107 * 2**20,
    )  # fmt: skip
    status = msgspec.structs.replace(STATUS, loras=loras)
    daemon.answers[GetStatus] = lambda request: [Status(request_id=request.request_id, daemon=status)]
    main(["status", "--runtime-dir", str(folder)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "loras 7 jobs, 6 switches, the last in 0.08 ms, the slowest 0.33 ms; plain blocks run" in lines
    assert "130 of 140 forwards were captured ones; copies of factors take 107.0 MiB" in lines


def test_status_shows_how_packed_weights_are_multiplied_and_what_they_take(daemon, folder, capsys):
    packed = PackedProducts(format="q8_0", reference=40, native=0, why_not_native={"q8_0 has no native product": 40})
    mixed = PackedProducts(format="int8", reference=12, native=8, why_not_native={"too old": 10, "its rows": 2})
    facts = msgspec.structs.replace(
        sample_facts.TRANSFORMER, bytes_by_format={"q8_0": 2**30}, scratch_bytes=108 * 2**20
    )
    component = msgspec.structs.replace(STATUS.components[0], facts=facts)
    status = msgspec.structs.replace(
        STATUS, packed_products=(packed, mixed), components=(*STATUS.components, component)
    )
    daemon.answers[GetStatus] = lambda request: [Status(request_id=request.request_id, daemon=status)]
    main(["status", "--runtime-dir", str(folder)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "q8_0 40 0 q8_0 has no native product" in lines
    start = lines.index("int8 12 8 several reasons:")
    assert lines[start + 1 : start + 3] == ["10 too old", "2 its rows"]
    assert "scratch 108.0 MiB of each worker, into which packed weights are dequantised" in lines
    assert ["q8_0 1.0 GiB" in line for line in lines if line.startswith("transformer-1")] == [False, True]


def has_group(daemon, *states):
    """Set the worker group's state for each status reply in turn; the last one is repeated."""
    left = list(states)

    def answer(request):
        state = left.pop(0) if len(left) > 1 else left[0]
        detail = "" if state in (GroupState.READY, GroupState.BUSY) else f"rank 1 is {state.value}"
        found = msgspec.structs.replace(STATUS, group_state=state, group_detail=detail)
        return [Status(request_id=request.request_id, daemon=found)]

    daemon.answers[GetStatus] = answer


@pytest.mark.parametrize("state", list(GroupState))
def test_status_check_fails_without_workers_and_says_why(daemon, folder, capsys, state):
    has_group(daemon, state)
    assert main(["status", "--runtime-dir", str(folder)]) == exits.DONE
    capsys.readouterr()
    code = main(["status", "--runtime-dir", str(folder), "--check"])
    captured = capsys.readouterr()
    assert "GPU-b" in captured.out
    if state in (GroupState.READY, GroupState.BUSY):
        assert (code, captured.err) == (exits.DONE, "")
    else:
        assert code == exits.FAILED
        assert captured.err == f"xditd status: workers {state.value.replace('_', ' ')}: rank 1 is {state.value}\n"


def test_wait_returns_once_the_workers_are_ready(daemon, folder, capsys):
    has_group(daemon, GroupState.STARTING, GroupState.STARTING, GroupState.DEAD, GroupState.STARTING, GroupState.READY)
    assert main(["wait", "--runtime-dir", str(folder), "--json"]) == exits.DONE
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"pid": 41, "group_state": "ready", "workers": 2}
    assert captured.err.splitlines() == [
        "xditd wait: workers starting: rank 1 is starting",
        "xditd wait: workers dead: rank 1 is dead",
        "xditd wait: workers starting: rank 1 is starting",
    ]


def test_wait_for_the_daemon_alone(daemon, folder, capsys):
    has_group(daemon, GroupState.STARTING)
    assert main(["wait", "--runtime-dir", str(folder), "--for", "daemon"]) == exits.DONE
    assert capsys.readouterr().out == "daemon 41: workers starting\n"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (GroupState.GIVEN_UP, "workers_unavailable: workers given up: rank 1 is given_up; fix the cause"),
        (GroupState.STARTING, "deadline_exceeded: workers starting: rank 1 is starting; not ready within 0 s"),
    ],
)
def test_wait_that_times_out_exits_with_1(daemon, folder, capsys, state, says):
    has_group(daemon, state)
    wait_s = "0" if state is GroupState.STARTING else "60"
    assert main(["wait", "--runtime-dir", str(folder), "--wait-s", wait_s]) == exits.FAILED
    assert says in capsys.readouterr().err


def test_wait_without_a_daemon_exits_with_3(folder, capsys):
    assert main(["wait", "--runtime-dir", str(folder), "--wait-s", "1"]) == exits.UNREACHABLE
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2  # the reason for waiting, printed once, and the error
    assert all("no such socket" in line for line in said)
    assert said[1].endswith("; none answered within 1 s")


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
