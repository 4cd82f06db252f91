"""Attention of split tokens: on several ranks, what torch computes on one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from forked_programs import ProgramServer, load_program

from xditd.gpu_workers.parallel.streams import Ranks, Stream
from xditd.gpu_workers.parallel.token_attention import TokenMismatch, Tokens, attend

PROGRAM = Path(__file__).with_name("attending_ranks.py")
attending_ranks = load_program(PROGRAM)


@pytest.fixture(scope="module")
def find(
    tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer
) -> Callable[[int], list[dict[str, str]]]:
    """Return what was wrong on each of a number of ranks, by scenario."""

    @cache
    def run(ranks: int) -> list[dict[str, str]]:
        folder = tmp_path_factory.mktemp("attending")
        done = fork_program(PROGRAM, folder, ranks)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads((folder / f"ranks{ranks}-{rank}.json").read_text()) for rank in range(ranks)]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [each.__name__ for each in attending_ranks.SCENARIOS])
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_give_what_one_gives(find: Callable[[int], list[dict[str, str]]], ranks: int, scenario: str) -> None:
    for rank, faults in enumerate(find(ranks)):
        assert scenario not in faults, f"rank {rank}: {faults[scenario]}"


@pytest.mark.multigpu
def test_ranks_give_what_one_gives_through_the_memory_of_peers(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path), "2", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        faults = json.loads((tmp_path / f"ranks2-{rank}.json").read_text())
        assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())


def test_the_order_of_joined_streams_is_that_of_ranks() -> None:
    tokens = Tokens((Stream.of(3, 2), Stream.of(5, 2)))
    assert tokens.counts == (5, 3)
    assert tokens.total == 8
    # Of the first stream 0, 1 | 2; of the second 3, 4, 5 | 6, 7.
    assert tokens.order(torch.device("cpu")).tolist() == [0, 1, 3, 4, 5, 2, 6, 7]
    assert tokens.own_places(1, torch.device("cpu")).tolist() == [2, 6, 7]


def test_a_mask_for_other_tokens_is_refused_where_keys_are_whole() -> None:
    queries = Tokens((Stream.of(7, 2),))
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 5, 2, 8)
    for rows in (1, 4, 7):
        mask = torch.ones(1, 1, rows, 5, dtype=torch.bool)
        assert attend(query, key, key, mask, queries, None, Ranks(None, 0, 2), attending_ranks.attention).shape[1] == 4
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    with pytest.raises(TokenMismatch, match="not one of 4 or 7 tokens"):
        attend(query, key, key, mask, queries, None, Ranks(None, 0, 2), attending_ranks.attention)
