"""Compile the fused kernels when a group starts, so that no job waits for it; Triton keeps them on disk."""

from __future__ import annotations

import time

import torch

from xditd.gpu_workers.kernels import triton_kernels
from xditd.gpu_workers.kernels.eight_bits import quantise
from xditd.gpu_workers.kernels.products import EIGHT

HIDDEN = 3072
"""FLUX.1's width. Another one compiles at its first step."""

_ROWS = 16


def compile_kernels(rank: int, ranks: int, device: torch.device, precision: str) -> float:
    """Run every kernel once on a few rows, for bfloat16 weights of FLUX.1; return the seconds it took.

    ``ranks`` share the tokens of an image, and this is the ``rank``-th of them.
    """
    started = time.perf_counter()
    heads = HIDDEN // triton_kernels.HEAD_SIZE

    def some(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)

    x, modulation, qkv = some(_ROWS, HIDDEN), some(2, 6 * HIDDEN), some(_ROWS, 3 * HIDDEN)
    norms = (some(triton_kernels.HEAD_SIZE),) * 4
    angles = (torch.ones(_ROWS, triton_kernels.HEAD_SIZE // 2, device=device),) * 2
    is_eight = precision == EIGHT
    modulate = triton_kernels.add_and_modulate_to_eight_bits if is_eight else triton_kernels.add_and_modulate
    modulate(x, text_rows=1, shift=(modulation, 0))
    for block in (modulation, modulation[0]):
        modulate(x, text_rows=1, added=x, gate=(block, 2 * HIDDEN), shift=(block, 3 * HIDDEN))
    if is_eight:
        hidden = some(_ROWS, 4 * HIDDEN)
        quantise(x)  # attention, and weights as wide
        quantise(hidden)  # weights alone are
        quantise(some(_ROWS, 5 * HIDDEN))
        quantise(gelu_of=hidden)
        quantise(x, gelu_of=hidden)
    triton_kernels.add_and_modulate(x, text_rows=1, added=x, gate=(modulation[0], 2 * HIDDEN))
    matrix, bias = some(_ROWS, HIDDEN), some(_ROWS)
    weights, biases = (torch.tensor([tensor.data_ptr()], device=device) for tensor in (matrix, bias))
    triton_kernels.multiply_vectors(weights, biases, x[:1], _ROWS)
    triton_kernels.norm_and_rotate(qkv, heads=heads, norms=norms, angles=angles, text_rows=1)
    if ranks > 1:
        # Every rank's buffer is this rank's own here: it holds what all ranks would get together.
        buffer = some(3 * _ROWS, HIDDEN)
        own = torch.tensor([buffer.data_ptr()] * ranks, device=device)
        triton_kernels.norm_and_rotate(
            qkv, heads=heads, norms=norms, angles=angles, text_rows=1, bases=own, first_row=0, all_rows=_ROWS
        )
        triton_kernels.send_rows(x[:, : HIDDEN // ranks].contiguous(), bases=own, rank=rank, rows_a_rank=_ROWS)
        flags = torch.ones(ranks, dtype=torch.int64, device=device)
        triton_kernels.meet(bases=torch.tensor([flags.data_ptr()] * ranks, device=device), rank=rank, round_number=1)
    torch.cuda.synchronize(device)
    return time.perf_counter() - started
