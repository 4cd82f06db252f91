"""Attention over a sequence that ranks share: Ulysses, ring, or both, by the layout in use.

Exact for every number of tokens: each rank has equally many, with all padding at the end of the last rank's, where keys
and values are cut off.
"""

from __future__ import annotations

import torch
from xfuser.core.distributed import get_ring_parallel_world_size, get_runtime_state, get_sp_group
from xfuser.model_executor.layers.usp import USP, _combined_qkv_all_to_all, _ft_c_output_all_to_all

from xditd.gpu_workers.parallel import ring


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    valid: int | None = None,
    layer: torch.nn.Module | None = None,
) -> torch.Tensor:
    """Attend from this rank's tokens to those of every rank in its sequence group.

    All are (batch, heads, tokens, head size), of the same shape on every rank. Of the tokens of all ranks, in order,
    the first ``valid`` count; without it all do. ``layer`` is the attention module, for xfuser's settings of it. Every
    rank makes the same calls in the same order.
    """
    if get_ring_parallel_world_size() == 1:
        return USP(
            query,
            key,
            value,
            combine_qkv_a2a=True,
            attn_layer=layer,
            attention_kwargs=None if valid is None else {"valid_kv_len": valid},
        )
    attended = ring.attend(
        *_combined_qkv_all_to_all(query, key, value),
        backend=get_runtime_state().attention_backend.name,
        group=get_sp_group().ring_group,
        valid=valid,
    )
    return _ft_c_output_all_to_all(attended)
