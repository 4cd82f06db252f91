"""The layout of one component: the group's, with the Ulysses and ring degrees that its attention heads allow."""

from __future__ import annotations

import dataclasses

import torch

from xditd.gpu_workers.parallel import attention, ring, sequence_groups
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks
from xditd.ipc import layout_choice
from xditd.ipc.degrees import Degrees
from xditd.ipc.errors import Unsupported


def choose(layout: ParallelLayout, family: str, heads: int, dtype: torch.dtype) -> ParallelLayout:
    """Return the layout of a component with ``heads`` attention heads in ``dtype``, and make its process groups.

    ``layout`` is the group's. ``heads`` is 0 for a component without sequence parallelism. Every rank calls this at
    the same point.

    Raises:
        Unsupported: the heads need a ring, for which the configured attention backend does not work.
        OtherRankFailed: it works on this rank, but not on another.
    """
    degrees = layout_choice.for_heads(layout.degrees, heads) if heads else layout.degrees
    backend = layout.attention_backend
    if degrees != layout.degrees:
        if layout.degrees.ring == 1:
            with raise_on_all_ranks():
                backend = _backend_for_ring(layout, degrees, f"{family}: {heads} attention heads")
        sequence_groups.make(degrees)
    return dataclasses.replace(
        layout, degrees=degrees, attention_backend=attention.for_dtype(backend, dtype, layout.device)
    )


def use(layout: ParallelLayout) -> None:
    """Set the backend and process groups of this process's attention. Call before every forward."""
    attention.use(layout.attention_backend)
    sequence_groups.use(layout.degrees)


def _backend_for_ring(layout: ParallelLayout, degrees: Degrees, what: str) -> str:
    try:
        return ring.choose_backend(layout.requested_attention, layout.device)
    except Unsupported as error:
        raise Unsupported(
            f"{what} need the layout {degrees}, and {error.detail}; "
            f"or start the daemon with --workers {degrees.cfg * degrees.ulysses}"
        ) from error
