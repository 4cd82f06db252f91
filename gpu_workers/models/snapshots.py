"""The contents of lists, maps, sets and objects at one moment: to find what a forward has changed, and to undo it."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch

from xditd.ipc.transports.module_walk import is_describable


class Snapshot:
    """The contents of some values and of all that they hold, without the elements of tensors."""

    def __init__(self, roots: Iterable[object]) -> None:
        self._saved: dict[int, tuple[Any, Any]] = {}
        """The containers, which this keeps alive, and copies of them, by id."""
        pending: list[Any] = list(roots)
        while pending:
            each = pending.pop()
            if id(each) in self._saved:
                continue
            if type(each) in (dict, OrderedDict):
                self._saved[id(each)] = each, dict(each)
                pending += each.values()
            elif type(each) in (list, set):
                self._saved[id(each)] = each, type(each)(each)
                pending += each
            elif isinstance(each, tuple):
                pending += each
            elif not isinstance(each, (torch.Tensor, torch.nn.Module)) and is_describable(each):
                pending.append(vars(each))

    def is_current(self) -> bool:
        """Return whether every container holds the same objects still."""
        return all(_is_same(each, copy) for each, copy in self._saved.values())

    def restore(self) -> None:
        """Give every container its contents back."""
        for each, copy in self._saved.values():
            if len(each) != len(copy) or (copy and not _is_same(each, copy)):  # most are empty
                each.clear()
                (each.extend if isinstance(each, list) else each.update)(copy)


def _is_same(container: Any, copy: Any) -> bool:
    if len(container) != len(copy):
        return False
    if isinstance(container, set):
        return bool(container == copy)
    if isinstance(container, list):
        return all(map(operator.is_, container, copy))
    return all(map(operator.is_, container.values(), copy.values())) and all(map(operator.eq, container, copy))
