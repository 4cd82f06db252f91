"""The stress program itself: it passes on a sound daemon, and cannot pass on planted defects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import run
import soak
from faults import choose_faults
from findings import Findings, as_json, as_table

RUN = Path(__file__).with_name("run.py")
SOUND = Findings({"right": 9, "wrong": 0, "faults": {"cancel": 3}, "processes below it": [4, 4]}, [], [])
BAD = Findings({"right": 9, "wrong": 1}, ["1 wrong results"], ["client 2: seed 3"])


def test_the_table_ends_with_the_verdict():
    assert as_table({"soak": SOUND}).splitlines() == [
        "--- soak",
        "right               9",
        "wrong               0",
        "faults              3 cancel",
        "processes below it  4, 4",
        "passed",
    ]
    assert as_table({"soak": SOUND, "fuzz": BAD}).splitlines()[-2:] == ["FAILED: fuzz: 1 wrong results", "1 failures"]


def test_json_has_figures_failures_and_the_machine():
    found = json.loads(as_json({"soak": BAD}, {"seed": 7}))
    assert found["seed"] == 7
    assert found["soak"] == {
        "right": 9,
        "wrong": 1,
        "failed": ["1 wrong results"],
        "notes": ["client 2: seed 3"],
    }
    assert found["machine"]["python"]


@pytest.mark.parametrize(("found", "status"), [(SOUND, 0), (BAD, 1)])
def test_the_exit_status_tells(found, status, monkeypatch, capsys):
    monkeypatch.setattr(run, "fuzz", lambda *_: found)
    assert run.main(["--only", "fuzz"]) == status
    assert capsys.readouterr().out


def test_help_teaches_every_fault_and_misuse_is_told():
    done = subprocess.run([sys.executable, str(RUN), "--help"], capture_output=True, text=True, check=True)
    assert all(f"  {fault.name} " in done.stdout for fault in choose_faults(None))
    wrong = subprocess.run([sys.executable, str(RUN), "--faults", "paws"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "'paws': unknown" in wrong.stderr


@pytest.mark.long
def test_some_seconds_of_everything_that_clients_do():
    names = ["cancel", "return", "leave", "garbage", "half-greeting", "kill-client"]
    command = [sys.executable, str(RUN), "--only", "soak", "--minutes", "0.4", "--faults", *names, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)["soak"]
    assert (found["failed"], done.returncode) == ([], 0)
    assert found["right"] >= soak.CLIENTS
    assert (found["wrong"], found["hung"], found["leaked"]) == (0, 0, 0)


@pytest.mark.long
def test_a_wrong_result_of_a_real_daemon_is_reported(monkeypatch):
    """Two references are exchanged: what the workers give is then not what this seed must give."""

    def exchange(references, folder, keep=oracle.keep_references):
        references["1/0"], references["1/1"] = references["1/1"], references["1/0"]
        keep(references, folder)

    monkeypatch.setattr(oracle, "keep_references", exchange)
    with soak.Soak(choose_faults(["kill-client"]), seed=1) as stress:
        found = stress.run(minutes=0.4)
    assert any("wrong results" in failure for failure in found.failures)
    assert any("checkpoint 1, seed" in note for note in found.notes)
