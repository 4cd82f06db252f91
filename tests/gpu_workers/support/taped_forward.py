"""A double of ``CapturedForward`` for machines without a GPU: a tape of the operators of torch, run again and again.

Like a graph it has the tensors and the numbers of the forward that it was made from, and asks the host for none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xditd.gpu_workers.parallel.row_trees import build, structure_of, tensors_of


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class TapedForward:
    """See :class:`~xditd.gpu_workers.models.captured_forward.CapturedForward`."""

    memory_bytes = 0

    def __init__(
        self,
        forward: Callable[[Mapping[str, Any]], Any],
        arguments: Mapping[str, Any],
        weights: Sequence[torch.Tensor] = (),
        device: Any = None,
        counts: Any = None,
    ) -> None:
        self.arguments = arguments
        with _Tape() as tape:
            result = forward(arguments)
        self._calls = tape.calls
        self._structure, self._results = structure_of(result, 0), list(tensors_of(result))

    def run(self, arguments: Mapping[str, Any]) -> Any:
        for mine, its in zip(tensors_of(self.arguments), tensors_of(arguments), strict=True):
            mine.copy_(its)
        return self.replay_last()

    def replay_last(self) -> Any:
        for func, args, kwargs, result in self._calls:
            given = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)
        assert self._structure is not None
        return build(self._structure, (each.clone() for each in self._results))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]
