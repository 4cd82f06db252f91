"""Triton kernels that store heads or tokens into the memory of the rank that needs them.

Tensors are (batch, tokens, heads, head size) with any strides but that of the last dimension, which is 1. ``bases`` are
the addresses of the memory of all ranks, on the GPU; offsets in it are in bytes and the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit
def _load_heads(x_ptr, batch_stride, row_stride, head_stride, first_head, HEADS: tl.constexpr, HEAD: tl.constexpr,
                GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    heads = tl.arange(0, GROUP)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    here = x_ptr + batch * batch_stride + row * row_stride + (first_head + heads) * head_stride + columns
    return tl.load(here, mask=(heads < HEADS) & (columns < HEAD))


@triton.jit(do_not_specialize=["offset_bytes", "first_row", "all_rows"])
def _send_heads(
    first_ptr,
    first_batch_stride,
    first_row_stride,
    first_head_stride,
    second_ptr,
    second_batch_stride,
    second_row_stride,
    second_head_stride,
    third_ptr,
    third_batch_stride,
    third_row_stride,
    third_head_stride,
    bases_ptr,
    offset_bytes,
    first_row,
    all_rows,
    RANKS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    owner = tl.program_id(2) % RANKS
    part = tl.program_id(2) // RANKS
    first_head = owner * HEADS
    if part == 0:
        x = _load_heads(
            first_ptr, first_batch_stride, first_row_stride, first_head_stride, first_head, HEADS, HEAD, GROUP, BLOCK
        )
    elif part == 1:
        x = _load_heads(
            second_ptr, second_batch_stride, second_row_stride, second_head_stride, first_head, HEADS, HEAD, GROUP,
            BLOCK,
        )  # fmt: skip
    else:
        x = _load_heads(
            third_ptr, third_batch_stride, third_row_stride, third_head_stride, first_head, HEADS, HEAD, GROUP, BLOCK
        )
    heads = tl.arange(0, GROUP)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    base = (tl.load(bases_ptr + owner) + offset_bytes).to(tl.pointer_type(x.dtype))
    image = part.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    there = (image * all_rows + first_row + tl.program_id(0)) * (HEADS * HEAD) + heads * HEAD + columns
    tl.store(base + there, x, mask=(heads < HEADS) & (columns < HEAD))


@triton.jit(do_not_specialize=["offset_bytes", "rank"])
def _send_tokens(
    x_ptr,
    batch_stride,
    row_stride,
    head_stride,
    bases_ptr,
    ends_ptr,
    offset_bytes,
    rank,
    RANKS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x = _load_heads(x_ptr, batch_stride, row_stride, head_stride, 0, HEADS, HEAD, GROUP, BLOCK)
    row = tl.program_id(0)
    owner = row * 0
    last = tl.load(ends_ptr)
    first = last * 0
    for number in tl.static_range(RANKS - 1):
        end = tl.load(ends_ptr + number)
        is_later = row >= end
        owner += is_later.to(tl.int32)
        last = tl.where(is_later, tl.load(ends_ptr + number + 1), last)
        first = tl.where(is_later, end, first)
    heads = tl.arange(0, GROUP)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    base = (tl.load(bases_ptr + owner) + offset_bytes).to(tl.pointer_type(x.dtype))
    there = (tl.program_id(1) * (last - first) + row - first) * RANKS + rank
    tl.store(base + there * (HEADS * HEAD) + heads * HEAD + columns, x, mask=(heads < HEADS) & (columns < HEAD))


def send_heads(
    tensors: Sequence[torch.Tensor], *, bases: torch.Tensor, offset_bytes: int, first_row: int, all_rows: int
) -> None:
    """Store each rank's heads of one to three tensors of one shape into its memory, to the rows from ``first_row`` on.

    There, from ``offset_bytes`` on, is one (tensors, batch, ``all_rows``, heads of a rank, head size) buffer.
    """
    batch, rows, all_heads, head = tensors[0].shape
    ranks = len(bases)
    heads = all_heads // ranks
    three = [tensors[min(number, len(tensors) - 1)] for number in range(3)]
    given = [argument for each in three for argument in (each, *each.stride()[:3])]
    _send_heads[(rows, batch, ranks * len(tensors))](
        *given,
        bases,
        offset_bytes,
        first_row,
        all_rows,
        RANKS=ranks,
        HEADS=heads,
        HEAD=head,
        GROUP=triton.next_power_of_2(heads),
        BLOCK=triton.next_power_of_2(head),
        num_warps=4,
    )


def send_tokens(x: torch.Tensor, *, bases: torch.Tensor, ends: torch.Tensor, offset_bytes: int, rank: int) -> None:
    """Store each rank's tokens of ``x``, this rank's heads, into its memory.

    ``ends`` are the ends of the tokens of all ranks, int64 on the GPU. From ``offset_bytes`` on is one (batch, own
    tokens, ranks, heads of a rank, head size) buffer.
    """
    batch, rows, heads, head = x.shape
    _send_tokens[(rows, batch)](
        x,
        *x.stride()[:3],
        bases,
        ends,
        offset_bytes,
        rank,
        RANKS=len(bases),
        HEADS=heads,
        HEAD=head,
        GROUP=triton.next_power_of_2(heads),
        BLOCK=triton.next_power_of_2(head),
        num_warps=4,
    )
