"""Run a program that computes on several ranks together, and on rank 0 alone, and read what each rank wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import torch
from forked_programs import ProgramServer
from safetensors.torch import load_file

Results = list[dict[str, torch.Tensor]]
"""The tensors of each rank, by name."""

RANKS: Final = [
    pytest.param((2, "cpu"), id="2 on the CPU"),
    pytest.param((3, "cpu"), id="3 on the CPU", marks=(pytest.mark.slow, pytest.mark.long)),
    pytest.param((2, "cuda"), id="2 GPUs", marks=pytest.mark.multigpu),
]
"""Numbers of ranks and kinds of devices, as parameters of a fixture."""


def run_split(program: Path, folder: Path, ranks: int, kind: str, fork_program: ProgramServer) -> Results:
    """Run ``program FOLDER RANKS KIND``, each of whose ranks writes ``rank<N>.safetensors``."""
    if kind == "cpu":
        done = fork_program(program, folder, ranks, kind)
    else:  # a process that was forked can use no GPU
        command = [sys.executable, str(program), str(folder), str(ranks), kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(ranks)]


def cases(made: Results) -> list[str]:
    """Return the names of the cases, each of which rank 0 has computed alone, too."""
    found = [name.removesuffix("/whole") for name in made[0] if name.endswith("/whole")]
    assert found, "the program computed no case"
    return found
