"""The attentions of a block: recorded by the function that computes each, and computed by that function again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional

from xditd.gpu_workers.models.replaced_attention import DISPATCH, functions_replaced, namespaces


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """An attention of a block, without its tensors.

    ``options`` are the further arguments of the function. ``site`` is the path in the block of the submodule that a
    token plan declares for it; ``None``: the tokens are not split. ``fault`` says why it cannot be in a graph.
    """

    is_torch: bool
    """Whether torch's function computes it; otherwise that of diffusers, with the backend that is active then."""
    options: Mapping[str, Any]
    heads_first: bool
    site: str | None = None
    fault: str = ""


class Attend(Protocol):
    """What computes an attention that a block asks for; ``compute`` is what would have."""

    def __call__(
        self,
        call: AttentionCall,
        compute: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor: ...


class AttentionFunctions:
    """The functions with which diffusers' models compute attention, wherever they are known by name."""

    def __init__(self) -> None:
        self._namespaces = namespaces()

    def compute(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute an attention as the block would now: by the function that is in place."""
        if call.is_torch:
            return functional.scaled_dot_product_attention(query, key, value, mask, **call.options)
        return self._namespaces[0][DISPATCH](query, key, value, mask, **call.options)

    @contextmanager
    def replaced(self, attend: Attend) -> Iterator[None]:
        """Let ``attend`` compute each attention: for one call of a block, in the thread that runs forwards."""
        of_torch = functional.scaled_dot_product_attention

        def scaled_dot_product_attention(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            **kwargs: Any,
        ) -> torch.Tensor:
            options = {"dropout_p": dropout_p, "is_causal": is_causal, **kwargs}
            call = _call(True, options, heads_first=query.ndim == 4)
            return attend(call, partial(_with, of_torch, options), query, key, value, attn_mask)

        def dispatched(
            function: Callable[..., torch.Tensor],
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            options = dict(zip(_DISPATCH_OPTIONS, args, strict=False)) | kwargs
            call = _call(False, options, heads_first=False)
            return attend(call, partial(_with, function, options), query, key, value, attn_mask)

        with functions_replaced(scaled_dot_product_attention, dispatched, self._namespaces):
            yield


_DISPATCH_OPTIONS = ("dropout_p", "is_causal", "scale", "enable_gqa", "attention_kwargs")


def _with(function: Callable[..., torch.Tensor], options: Mapping[str, Any], *tensors: Any) -> torch.Tensor:
    return function(*tensors, **options)


def _call(is_torch: bool, options: Mapping[str, Any], *, heads_first: bool) -> AttentionCall:
    fault = "an attention of a block has tensors among its options" if _holds_tensor(options) else ""
    return AttentionCall(is_torch, options, heads_first, fault=fault)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(each) for each in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(_holds_tensor(each) for each in value)
    return isinstance(value, torch.Tensor)
