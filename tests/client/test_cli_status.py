"""``xditd status`` and ``xditd wait``: tables and JSON for each part of a status, and their exit codes."""

import json

import msgspec
import pytest
import sample_facts
from sample_status import STATUS, answers_status

from xditd.client.cli import exits
from xditd.client.cli.main import main
from xditd.ipc.facts import ComponentFacts, ModuleFacts
from xditd.ipc.replies import Status
from xditd.ipc.requests import GetStatus
from xditd.ipc.status import (
    GroupState,
    LeaseState,
    LoraCounts,
    PackedProducts,
    SplitCheck,
)
from xditd.ipc.tensors import ComponentKind


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
