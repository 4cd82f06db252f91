"""Triton dequantises packed weights to the numbers that their formats define, on GPUs and in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import packed_cases
import pytest
import torch

from xditd.gpu_workers.kernels.packed_kernels import can_rotate

HERE = Path(__file__).parent


@pytest.mark.slow
def test_in_the_interpreter_results_are_those_of_the_references() -> None:
    program = HERE / "interpreted_packed.py"
    environment = os.environ | {"PYTHONPATH": str(HERE.parent / "support"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_references_of_blocks_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for kind in ("q8_0", "q4_k", "q5_k", "q6_k"):
        blocks = packed_cases.random_blocks(kind, 1, 3, torch.Generator().manual_seed(5))
        expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.upper()])
        size = packed_cases.GGUF_BLOCKS[kind].size_bytes
        found = [number for block in blocks.view(-1, size) for number in packed_cases.block_numbers(kind, bytes(block))]
        assert found == expected[0].tolist(), kind


def test_a_group_is_rotated_if_it_is_a_power_of_4_to_1024_that_divides_the_row() -> None:
    assert can_rotate(256, 3072)
    assert not can_rotate(4096, 4096 * 3)  # sums would be rounded
    assert not can_rotate(4, 24)  # 16 numbers is the least that a product of matrices takes
    assert not can_rotate(128, 1024)  # no power of 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", packed_cases.DTYPES)
class TestOnGpu:
    @pytest.mark.parametrize("shape", [*packed_cases.SHAPES, *packed_cases.ODD_SHAPES, (3072, 15360)])
    def test_int8_becomes_its_numbers(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        packed_cases.check_int8(shape, dtype, "cuda")

    @pytest.mark.parametrize("group", packed_cases.GROUPS)
    @pytest.mark.parametrize("rows", [5, 1, 1027])
    def test_int8_convrot_becomes_its_numbers(self, dtype: torch.dtype, group: int, rows: int) -> None:
        packed_cases.check_rotated(group, rows, dtype, "cuda")

    @pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize("shape", [(5, 259), (33, 3072), (1, 1)])
    def test_float8_becomes_its_numbers(self, dtype: torch.dtype, kind: torch.dtype, shape: tuple[int, int]) -> None:
        packed_cases.check_float8(kind, shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["q8_0", "q4_k", "q5_k", "q6_k"])
@torch.inference_mode()
def test_gguf_blocks_and_empty_weights_become_their_numbers_on_a_gpu(kind: str) -> None:
    packed_cases.check_gguf(kind, 7, 12, "cuda")
    packed_cases.check_empty("cuda")
