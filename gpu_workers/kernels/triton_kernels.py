"""Triton kernels between the matrix products of a transformer block with one or two streams.

Eager diffusers runs about ten element-wise kernels between two matrix products, each of which reads and writes every
token; here it is one kernel. All compute in float32 and round wherever diffusers does, so that results differ by the
order of a few sums alone.

Rows are tokens, text first; images begin at ``text_rows``, since the two streams of a double block have their own
modulation and norms. Inputs are contiguous but for a stride between rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xditd.gpu_workers.kernels.eight_bits import LARGEST, TINY, Quantised, to_given_scale

HEAD_SIZE = 128
EPSILON = 1e-6
FLOAT16_MAX = 65504.0
_MAX_HEADS_A_PROGRAM = 8
# Tried on an H200: 36 pairs of rows and columns, with 2, 4 and 8 warps; these read at 3.8 TB/s, others at 0.7 to 3.7.
_MAX_COLUMNS_A_LOAD = 256
# Triton's interpreter (for machines without a GPU) takes 10 ms for each program.
_ROWS_A_PROGRAM = 256 if triton.knobs.runtime.interpret else 2


@triton.jit(do_not_specialize=["text_rows"])
def _add_and_modulate(
    x_ptr,
    y_ptr,
    out_ptr,
    scales_ptr,
    given_ptr,
    gates_ptr,
    gate_at,
    gate_stride,
    shifts_ptr,
    shift_at,
    shift_stride,
    text_rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    LIMIT: tl.constexpr,
    EPS: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
):
    row = tl.program_id(0)
    stream = (row >= text_rows).to(tl.int64)
    kind = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    here = row.to(tl.int64) * WIDTH + columns
    x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gates_ptr + gate_at + stream * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + here, mask=inside, other=0.0).to(tl.float32)
        x += (gate * y).to(kind).to(tl.float32)
        if LIMIT > 0:
            x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        rounded = x.to(kind)
        tl.store(x_ptr + here, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if HAS_SHIFT:
        centred = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
        normed = (centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + EPS)).to(kind).to(tl.float32)
        shifts = shifts_ptr + shift_at + stream * shift_stride + columns
        shift = tl.load(shifts, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(shifts + WIDTH, mask=inside, other=0.0).to(tl.float32)
        scaled = normed * (1.0 + scale).to(kind).to(tl.float32)
        shifted = (scaled.to(kind).to(tl.float32) + shift).to(kind)
        if LARGEST > 0:
            wide = shifted.to(tl.float32)
            if HAS_SCALES:
                given = tl.load(given_ptr + stream)
                tl.store(scales_ptr + row, given)
                shifted = to_given_scale(wide, given, kind, LARGEST).to(out_ptr.dtype.element_ty)
            else:
                largest = tl.maximum(tl.max(tl.abs(wide), 0), TINY)
                tl.store(scales_ptr + row, largest / LARGEST)
                shifted = (wide * (LARGEST / largest)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + here, shifted, mask=inside)


@triton.jit(do_not_specialize=["text_rows", "first_row", "all_rows"])
def _norm_and_rotate(
    qkv_ptr,
    row_stride,
    bases_ptr,
    first_row,
    all_rows,
    text_query_ptr,
    text_key_ptr,
    image_query_ptr,
    image_key_ptr,
    cos_ptr,
    sin_ptr,
    text_rows,
    epsilon,
    HEADS: tl.constexpr,
    HEADS_A_RANK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    row = tl.program_id(0)
    first_head = tl.program_id(1) * GROUP
    part = tl.program_id(2)
    heads = tl.arange(0, GROUP)[:, None]
    columns = tl.arange(0, HEAD)[None, :]
    here = qkv_ptr + row.to(tl.int64) * row_stride + part * HEADS * HEAD + (first_head + heads) * HEAD + columns
    x = tl.load(here)
    kind = x.dtype
    if part < 2:
        is_text = row < text_rows
        if part == 0:
            weight = tl.load(text_query_ptr + columns) if is_text else tl.load(image_query_ptr + columns)
        else:
            weight = tl.load(text_key_ptr + columns) if is_text else tl.load(image_key_ptr + columns)
        wide = x.to(tl.float32)
        root = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD + epsilon)
        wide = (wide * root[:, None] * weight.to(tl.float32)).to(kind).to(tl.float32)
        angles = row * (HEAD // 2) + tl.arange(0, HEAD // 2)[None, :]
        cos = tl.load(cos_ptr + angles)
        sin = tl.load(sin_ptr + angles)
        even, odd = tl.split(tl.reshape(wide, (GROUP, HEAD // 2, 2)))
        turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
        x = tl.reshape(turned, (GROUP, HEAD)).to(kind)
    if IN_PLACE:
        tl.store(here, x)
    else:
        base = tl.load(bases_ptr + first_head // HEADS_A_RANK).to(tl.pointer_type(kind))
        there = (part.to(tl.int64) * all_rows + first_row + row) * HEADS_A_RANK + first_head % HEADS_A_RANK
        tl.store(base + (there + heads) * HEAD + columns, x)


@triton.jit(do_not_specialize=["rows_a_rank"])
def _send_rows(x_ptr, bases_ptr, rank, rows_a_rank, WIDTH: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    owner = row // rows_a_rank
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + row.to(tl.int64) * WIDTH + columns, mask=inside)
    base = tl.load(bases_ptr + owner).to(tl.pointer_type(x.dtype))
    there = (row - owner * rows_a_rank).to(tl.int64) * (WIDTH * RANKS) + rank * WIDTH
    tl.store(base + there + columns, x, mask=inside)


@triton.jit
def _barrier(bases_ptr, rank, RANKS: tl.constexpr):
    # Stores of earlier kernels are done when those have ended; release and acquire order them across GPUs.
    # Only this rank writes its own flag here, so that is the number of the last round.
    round_number = tl.load(tl.load(bases_ptr + rank).to(tl.pointer_type(tl.int64)) + rank) + 1
    for peer in tl.static_range(RANKS):
        flags = tl.load(bases_ptr + peer).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(flags + rank, round_number, sem="release", scope="sys")
    flags = tl.load(bases_ptr + rank).to(tl.pointer_type(tl.int64))
    for peer in tl.static_range(RANKS):
        seen = tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys")
        while seen < round_number:
            seen = tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys")


@triton.jit(do_not_specialize=["vectors"])
def _multiply_vectors(
    weights_ptr,
    biases_ptr,
    vectors_ptr,
    out_ptr,
    matrix_rows,
    vectors,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    matrix = tl.program_id(1)
    kind = vectors_ptr.dtype.element_ty
    weight = tl.load(weights_ptr + matrix).to(tl.pointer_type(kind))
    bias = tl.load(biases_ptr + matrix).to(tl.pointer_type(kind))
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # The rows of weights stay in the SM's cache from one vector to the next. Each vector gets the same bits as alone.
    for number in range(vectors):
        vector_ptr = vectors_ptr + number * WIDTH
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, WIDTH, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            vector = tl.load(vector_ptr + columns).to(tl.float32)
            total += tl.load(weight + rows[:, None] * WIDTH + columns[None, :]).to(tl.float32) * vector[None, :]
        result = tl.sum(total, 1) + tl.load(bias + rows).to(tl.float32)
        place = (number * tl.num_programs(1) + matrix).to(tl.int64) * matrix_rows
        tl.store(out_ptr + place + rows, result.to(kind))


Vectors = tuple[torch.Tensor, int]
"""Modulation of one block, (streams, chunks * width) or (chunks * width,), and the offset of a chunk in it."""


def add_and_modulate(
    x: torch.Tensor,
    *,
    text_rows: int,
    added: torch.Tensor | None = None,
    gate: Vectors | None = None,
    shift: Vectors | None = None,
) -> torch.Tensor:
    """Do ``x += gate * added`` in place, and return ``layer_norm(x) * (1 + scale) + shift``.

    Both are optional: without ``gate`` nothing is added, without ``shift`` the sum ``x`` is returned. ``x`` and
    ``added`` are (rows, width) and contiguous. ``scale`` is the chunk after ``shift``.
    """
    out = x if shift is None else torch.empty_like(x)
    _launch_add_and_modulate(x, text_rows, added, gate, shift, out, None)
    return out


def add_and_modulate_to_eight_bits(
    x: torch.Tensor,
    *,
    text_rows: int,
    added: torch.Tensor | None = None,
    gate: Vectors | None = None,
    shift: Vectors,
    scales: torch.Tensor | None = None,
) -> Quantised:
    """Do the same, and return the modulated rows in eight bits, with a scale for each; ``x`` keeps its dtype.

    ``scales``, float32 (2,), are those of all rows of text and of all others; without them each row has its own.
    """
    rows, width = x.shape
    out = Quantised.empty(rows, width, x.device)
    _launch_add_and_modulate(x, text_rows, added, gate, shift, out.values, out.scales, scales)
    return out


def _launch_add_and_modulate(
    x: torch.Tensor,
    text_rows: int,
    added: torch.Tensor | None,
    gate: Vectors | None,
    shift: Vectors | None,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    given: torch.Tensor | None = None,
) -> None:
    rows, width = x.shape
    gates, gate_at = (x, 0) if gate is None else gate
    shifts, shift_at = (x, 0) if shift is None else shift
    _add_and_modulate[(rows,)](
        x,
        x if added is None else added,
        out,
        x if scales is None else scales,
        x if given is None else given,
        gates,
        gate_at,
        gates.stride(0) if gates.ndim == 2 else 0,
        shifts,
        shift_at,
        shifts.stride(0) if shifts.ndim == 2 else 0,
        text_rows,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        HAS_GATE=gate is not None,
        HAS_SHIFT=shift is not None,
        HAS_SCALES=given is not None,
        LIMIT=FLOAT16_MAX if x.dtype == torch.float16 else 0.0,
        EPS=EPSILON,
        LARGEST=0.0 if scales is None else LARGEST,
        TINY=TINY,
        num_warps=8,
    )


def norm_and_rotate(
    qkv: torch.Tensor,
    *,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    text_rows: int,
    epsilon: float = EPSILON,
    bases: torch.Tensor | None = None,
    first_row: int = 0,
    all_rows: int = 0,
) -> None:
    """Norm and rotate queries and keys of ``qkv``, (rows, at least 3 * heads * 128), in place or into buffers.

    ``norms`` are the weights for queries and keys of text, then of images; ``angles`` cosines and sines, (rows, 64) in
    float32. With ``bases``, addresses of one (3, ``all_rows``, heads of a rank, 128) buffer for each rank, ``qkv`` does
    not change: queries, keys and values of each rank's heads go to its buffer, to the rows from ``first_row`` on.
    """
    ranks = 1 if bases is None else len(bases)
    group = _MAX_HEADS_A_PROGRAM
    while (heads // ranks) % group:
        group //= 2
    _norm_and_rotate[(qkv.shape[0], heads // group, 2 if bases is None else 3)](
        qkv,
        qkv.stride(0),
        qkv if bases is None else bases,
        first_row,
        all_rows,
        *norms,
        *angles,
        text_rows,
        epsilon,
        HEADS=heads,
        HEADS_A_RANK=heads // ranks,
        GROUP=group,
        HEAD=HEAD_SIZE,
        IN_PLACE=bases is None,
        num_warps=4,
    )


def send_rows(x: torch.Tensor, *, bases: torch.Tensor, rank: int, rows_a_rank: int) -> None:
    """Store each rank's rows of ``x``, (ranks * ``rows_a_rank``, width), into the ``rank``-th columns of its buffer.

    ``bases`` are the addresses of one (``rows_a_rank``, ranks * width) buffer for each rank. ``x`` is contiguous.
    """
    rows, width = x.shape
    _send_rows[(rows,)](
        x,
        bases,
        rank,
        rows_a_rank,
        WIDTH=width,
        RANKS=len(bases),
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )


def barrier(*, bases: torch.Tensor, rank: int) -> None:
    """Wait, on the GPU, until every rank has called this as often as this rank.

    ``bases`` are the addresses of every rank's flags: one 64-bit integer for each rank, zero at first. They count the
    calls, so that a captured call counts each time it is replayed.
    """
    _barrier[(1,)](bases, rank, RANKS=len(bases), num_warps=1)


def multiply_vectors(weights: torch.Tensor, biases: torch.Tensor, vectors: torch.Tensor, rows: int) -> torch.Tensor:
    """Multiply many matrices with each of some vectors, all in one kernel: (vectors, matrices, ``rows``).

    ``vectors`` are (vectors, width) and contiguous, ``weights`` and ``biases`` the addresses, as int64 on the GPU, of
    (``rows``, width) and (``rows``,) tensors of their dtype. For a few vectors it takes the time of reading the weights
    once; separate products by cuBLAS took twice as long for one vector.
    """
    count, width = vectors.shape
    columns = _MAX_COLUMNS_A_LOAD
    while width % columns:
        columns //= 2
    out = torch.empty(count, len(weights), rows, dtype=vectors.dtype, device=vectors.device)
    _multiply_vectors[(rows // _ROWS_A_PROGRAM, len(weights))](
        weights,
        biases,
        vectors,
        out,
        rows,
        count,
        WIDTH=width,
        ROWS=_ROWS_A_PROGRAM,
        COLUMNS=columns,
        num_warps=8,
    )
    return out
