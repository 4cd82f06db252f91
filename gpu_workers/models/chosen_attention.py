"""Let the attention of diffusers' classes be computed by the backend that was chosen for a component."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional

from xditd.gpu_workers.models.replaced_attention import functions_replaced, namespaces
from xditd.gpu_workers.parallel import attention
from xditd.gpu_workers.parallel.layouts import ParallelLayout


def chosen_attention(layout: ParallelLayout) -> AbstractContextManager[None]:
    """Return a context in which the layout's backend computes each attention without a mask; others stay the class's.

    On a CPU nothing changes unless a backend was asked for, so that one rank gives the bits of the class.
    """
    if layout.device.type == "cpu" and layout.requested_attention.lower() == attention.AUTO:
        return nullcontext()
    return _computed_by(attention.function(layout.attention_backend))


@contextmanager
def _computed_by(attend: Callable[..., torch.Tensor]) -> Iterator[None]:
    """``attend`` takes query, key and value, (batch, heads, tokens, head size)."""
    is_inside = False
    of_torch = functional.scaled_dot_product_attention

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        nonlocal is_inside
        is_inside = True  # the backend may be torch's own function
        try:
            return attend(query, key, value)
        finally:
            is_inside = False

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if is_inside or query.ndim != 4 or not _is_plain(attn_mask, dropout_p, is_causal, kwargs):
            return of_torch(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        return run(query, key, value)

    def dispatched(
        function: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if args or not _is_plain(attn_mask, dropout_p, is_causal, kwargs):
            return function(query, key, value, attn_mask, dropout_p, is_causal, *args, **kwargs)
        return run(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)

    with functions_replaced(scaled_dot_product_attention, dispatched, namespaces()):
        yield


def _is_plain(mask: torch.Tensor | None, dropout: float, is_causal: bool, options: dict[str, Any]) -> bool:
    return mask is None and not dropout and not is_causal and not any(options.values())
