"""Two gloo ranks and files that change: what fails on one rank fails on both, and each names the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_programs import ProgramServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("watching_ranks")
    done = fork_program(Path(__file__).with_name("watching_ranks.py"), folder)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, said=lambda case: [each[case] for each in facts])


def codes(lines: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines]


def test_a_file_that_is_overwritten_once_it_is_opened_is_stale_on_both(ranks: SimpleNamespace) -> None:
    said = ranks.said("opened")
    assert codes(said) == ["stale_source"] * 2
    assert all("opened.safetensors: changed since it was lent (ctime" in line for line in said)


def test_a_rank_that_has_read_a_file_before_it_changed_says_so_too(ranks: SimpleNamespace) -> None:
    """And not that another rank refused: on GPUs the first rank's share of a file that is cut short is still there."""
    said = ranks.said("read here and not there")
    assert codes(said) == ["stale_source"] * 2


def test_what_is_no_fault_of_the_file_is_the_other_ranks(ranks: SimpleNamespace) -> None:
    assert codes(ranks.said("no room there")) == ["other_rank_failed", "out_of_memory"]


def test_at_each_use_the_first_rank_looks_and_both_agree(ranks: SimpleNamespace) -> None:
    """A mode and a link are compared by the bytes; other bytes are refused, by jobs and by an adoption."""
    first, second = ranks.said("used")
    assert codes(first) == ["fine"] * 4 + ["stale_source"] * 2
    assert codes(second) == ["fine"] * 4 + ["other_rank_failed"] * 2
    assert "changed since it was lent (ctime and bytes)" in first[-1]


def test_the_first_rank_tells_what_a_file_held(ranks: SimpleNamespace) -> None:
    """The file called otherwise was never written to, but for its last bytes: those of ``used`` were lent."""
    first, second = ranks.said("used: digests")
    whole = (ranks.folder / "no room there.safetensors").read_bytes()
    assert first == {"used": [hashlib.blake2b(whole, digest_size=16).hexdigest()]}
    assert second == {}


@pytest.mark.parametrize("case", ["opened", "read here and not there", "no room there", "used"])
def test_nothing_stays_mapped(ranks: SimpleNamespace, case: str) -> None:
    assert ranks.said(f"{case}: blocks left") == [0, 0]
