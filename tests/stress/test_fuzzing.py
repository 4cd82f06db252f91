"""A short run of the fuzzer: no crash, bounded memory, and another client served meanwhile."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import hostile_bytes
import parsers
import pytest

RUN = Path(__file__).with_name("run.py")


def test_hostile_bytes_harm_nobody() -> None:
    sizes = ["--bytes", "500000", "--parser-bytes", "300000", "--seed", "3"]
    command = [sys.executable, str(RUN), "--only", "fuzz", *sizes, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    figures = json.loads(done.stdout)["fuzz"]
    # How long another client waits is for an idle machine to say.
    assert [failure for failure in figures["failed"] if "another client waited" not in failure] == []
    assert figures["messages"] > 500
    assert figures["answers"]["bad_message"] > 400
    assert figures["answers"]["Welcome"] > 0  # a stranger's messages would all be refused alike
    assert figures["another client's answers"] > 10


def test_the_same_seed_spoils_alike() -> None:
    made = [list(hostile_bytes.hostile_messages(5_000, random.Random(seed))) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("name", sorted(parsers.PARSERS))
def test_a_defect_of_a_parser_is_not_swallowed(name, monkeypatch):
    """A crash, or a message that changes on its way, ends the run."""

    def crash(data: bytes) -> None:
        raise IndexError("planted")

    monkeypatch.setitem(parsers.PARSERS, name, crash)
    with pytest.raises(IndexError, match="planted"):
        parsers.fuzz_parser(name, 1000, 1)
