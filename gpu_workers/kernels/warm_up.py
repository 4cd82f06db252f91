"""Compile the fused kernels when a group starts, so that no job waits for it; Triton caches them on disk."""

from __future__ import annotations

import time

import torch

from xditd.gpu_workers.kernels import triton_kernels
from xditd.gpu_workers.kernels.eight_bits import quantise
from xditd.gpu_workers.kernels.products import EIGHT

_ROWS = 16


def compile_kernels(hidden: int, rank: int, ranks: int, device: torch.device, precision: str) -> float:
    """Run every kernel once on a few rows of ``hidden`` channels, in bfloat16; return the seconds it took.

    ``ranks`` ranks share the tokens of an image; this one is number ``rank``.
    """
    started = time.perf_counter()
    heads = hidden // triton_kernels.HEAD_SIZE

    def some(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)

    x, modulation, qkv = some(_ROWS, hidden), some(2, 6 * hidden), some(_ROWS, 3 * hidden)
    norms = (some(triton_kernels.HEAD_SIZE),) * 4
    angles = (torch.ones(_ROWS, triton_kernels.HEAD_SIZE // 2, device=device),) * 2
    is_eight = precision == EIGHT
    modulate = triton_kernels.add_and_modulate_to_eight_bits if is_eight else triton_kernels.add_and_modulate
    modulate(x, text_rows=1, shift=(modulation, 0))
    for block in (modulation, modulation[0]):
        modulate(x, text_rows=1, added=x, gate=(block, 2 * hidden), shift=(block, 3 * hidden))
    if is_eight:
        inner = some(_ROWS, 4 * hidden)
        quantise(x)  # attention output, and weights of its width
        quantise(inner)  # weights of the other widths
        quantise(some(_ROWS, 5 * hidden))
        quantise(gelu_of=inner)
        quantise(x, gelu_of=inner)
    triton_kernels.add_and_modulate(x, text_rows=1, added=x, gate=(modulation[0], 2 * hidden))
    matrix, bias = some(_ROWS, hidden), some(_ROWS)
    weights, biases = (torch.tensor([tensor.data_ptr()], device=device) for tensor in (matrix, bias))
    triton_kernels.multiply_vectors(weights, biases, x[:1], _ROWS)
    triton_kernels.norm_and_rotate(qkv, heads=heads, norms=norms, angles=angles, text_rows=1)
    if ranks > 1:
        # All addresses are of one buffer of this rank, which is large enough for the rows of all ranks.
        buffer = some(3 * _ROWS, hidden)
        own = torch.tensor([buffer.data_ptr()] * ranks, device=device)
        triton_kernels.norm_and_rotate(
            qkv, heads=heads, norms=norms, angles=angles, text_rows=1, bases=own, first_row=0, all_rows=_ROWS
        )
        triton_kernels.send_rows(x[:, : hidden // ranks].contiguous(), bases=own, rank=rank, rows_a_rank=_ROWS)
        flags = torch.ones(ranks, dtype=torch.int64, device=device)  # the others have called it once already
        flags[rank] = 0
        triton_kernels.barrier(bases=torch.tensor([flags.data_ptr()] * ranks, device=device), rank=rank)
    torch.cuda.synchronize(device)
    return time.perf_counter() - started
