"""Replace the functions with which diffusers' models compute attention: that of torch, and that of its backends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.nn import functional

from xditd.gpu_workers.models.forward_state import ForwardState
from xditd.gpu_workers.models.token_plans import PlanFault

DISPATCH: Final = "dispatch_attention_fn"
"""diffusers' function for attention by any backend, which its models import by name."""


@contextmanager
def attention_replaced(
    forward: ForwardState, namespaces: Sequence[dict[str, Any]], refused_backends: tuple[str, ...]
) -> Iterator[None]:
    """Let a forward compute all attention of this process: that of torch, and that of diffusers' backends."""
    is_inside = False
    of_torch = functional.scaled_dot_product_attention

    def run_inside(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal is_inside
        is_inside = True
        try:
            return function(*args, **kwargs)
        finally:
            is_inside = False

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
        forward.check_causal(is_causal)
        _check_backend(refused_backends, kwargs.get("backend"))
        if (
            attn_mask is not None
            and attn_mask.ndim == 2
            and attn_mask.shape[0] == len(query)
            and (attn_mask.shape[1] > 1 or key.shape[1] == 1)
        ):
            attn_mask = attn_mask[:, None, None]  # diffusers takes such a mask as one of keys for each row

        def run(*given: Any) -> torch.Tensor:
            return run_inside(function, *given[:3], given[3], dropout_p, is_causal, *args, **kwargs)

        return forward.attend(query, key, value, attn_mask, run)

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if is_inside:
            return of_torch(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        forward.check_causal(is_causal)

        def run(*given: Any) -> torch.Tensor:
            q, k, v = (each.transpose(1, 2) for each in given[:3])
            return of_torch(q, k, v, given[3], dropout_p, is_causal, **kwargs).transpose(1, 2)

        q, k, v = (each.transpose(1, 2) for each in (query, key, value))
        return forward.attend(q, k, v, attn_mask, run).transpose(1, 2)

    with functions_replaced(scaled_dot_product_attention, dispatched, namespaces):
        yield


@contextmanager
def functions_replaced(
    of_torch: Callable[..., torch.Tensor],
    of_diffusers: Callable[..., torch.Tensor],
    namespaces: Sequence[dict[str, Any]],
) -> Iterator[None]:
    """Replace torch's function for attention, and diffusers' in each of ``namespaces``, in the whole process.

    ``of_diffusers`` takes the function that it replaces before the arguments. Those that were there come back at the
    end, so that such blocks can be nested.
    """
    replaced = functional.scaled_dot_product_attention
    dispatchers = [(namespace, namespace[DISPATCH]) for namespace in namespaces]
    functional.scaled_dot_product_attention = of_torch
    for namespace, function in dispatchers:
        namespace[DISPATCH] = partial(of_diffusers, function)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = replaced
        for namespace, function in dispatchers:
            namespace[DISPATCH] = function


def _check_backend(refused: tuple[str, ...], given: object) -> None:
    """Raise if the plan does not cover a backend of diffusers: that of an attention, or else the active one."""
    if refused:
        name = AttentionBackendName(given or _AttentionBackendRegistry.get_active_backend()[0]).value
        if name in refused:
            raise PlanFault(f"the attention backend {name!r}, with which this class attends in another way")


def namespaces() -> list[dict[str, Any]]:
    """Return those of diffusers' modules that have its function by name."""
    return [
        vars(each) for name, each in list(sys.modules.items())
        if name.startswith("diffusers.models.") and DISPATCH in vars(each)
    ]  # fmt: skip
