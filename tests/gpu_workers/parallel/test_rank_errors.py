"""Errors of torch and gloo are recognised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked_programs import ProgramServer

from xditd.gpu_workers.parallel.rank_errors import is_host_out_of_memory, is_peer_rank_failure, out_of_memory


def test_host_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_host_out_of_memory(caught.value)
    assert "memory" in out_of_memory(caught.value).detail
    assert is_host_out_of_memory(MemoryError())
    assert not is_host_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
def test_a_rank_that_dies_in_a_collective_is_recognised(tmp_path: Path, fork_program: ProgramServer) -> None:
    done = fork_program(Path(__file__).with_name("lost_rank.py"), tmp_path)
    assert done.stdout.startswith("True "), done.stdout + done.stderr[-2000:]


def test_other_errors_are_not_the_loss_of_a_rank() -> None:
    assert not is_peer_rank_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_peer_rank_failure(ValueError("Connection closed by peer"))
