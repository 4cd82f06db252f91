"""Run the calls of a class that keep keys and values, with their tokens split as its plan declares.

Each rank has the cache of the client, an object of the class, with its own share of the tensors. A call that is not
split, of this or of another module, has the whole of them first. The object's tensors are then new ones, for which the
client gets new ids: those that it has from before keep their contents for as long as it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from xditd.gpu_workers.models.class_model import ClassModel
from xditd.gpu_workers.models.finite import are_finite
from xditd.gpu_workers.models.object_tensors import change_tensors, copy_objects, plain_tree
from xditd.gpu_workers.models.snapshots import Snapshot
from xditd.gpu_workers.models.split_checks import Case, CaseKey, ModuleSnapshot
from xditd.gpu_workers.models.token_plans import Cache, PlanFault
from xditd.gpu_workers.parallel.rank_sync import agree, raise_on_all_ranks
from xditd.gpu_workers.parallel.row_gather import connect
from xditd.gpu_workers.parallel.row_trees import Node, batch_of, structure_of, tensors_of
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.gpu_workers.parallel.token_shares import TokenShares
from xditd.ipc.errors import XditdError
from xditd.ipc.status import SplitCheck

Arguments = Mapping[str, Any]


class Compare(Protocol):
    """Compares a result of split tokens with that of the class, on all ranks together."""

    def __call__(self, split: Any, whole: Any, structure: Node, batch: int, *, is_same_module: bool) -> SplitCheck: ...


@dataclass(frozen=True)
class CachedCalls:
    """The calls of one module. All ranks make the same ones in the same order."""

    model: ClassModel
    shares: TokenShares
    ranks: Ranks
    call: Callable[[Arguments], Any]
    run_tokens: Callable[..., Any]
    """Runs a call with its tokens split: raises ``PlanFault`` on all ranks where it is not as the plan declares."""
    compare: Compare
    report: Callable[[int, str], SplitCheck]
    """Describes a call whose tokens cannot be split: its batch, and why."""

    @property
    def _cache(self) -> Cache | None:
        return None if isinstance(self.model.planned, str) else self.model.planned.cache

    def has(self, arguments: Arguments, stateful: frozenset[str]) -> bool:
        """Return whether a call's only objects are a cache that the plan declares, given or made by the call."""
        cache = self._cache
        if cache is None or not stateful <= {cache.argument}:
            return False
        return arguments.get(cache.argument) is not None or cache.is_made(arguments)

    def describe(self, arguments: Arguments) -> dict[str, Any]:
        """Return arguments with a cache described by the sizes of its tensors, which are the same on all ranks."""

        def size(tensor: torch.Tensor) -> Any:
            found = torch.empty(self.shares.shape_of(tensor), dtype=tensor.dtype, device="meta")
            cut = self.shares.find(tensor)
            # Tokens of several calls are split in parts.
            parts = () if cut is None else tuple(each.tokens for each in cut.parts)
            return (found, parts) if len(parts) > 1 else found

        return {name: plain_tree(each, size, everywhere=False) for name, each in arguments.items()}

    def run(self, arguments: Arguments, key: CaseKey) -> Any:
        """Run a call; every rank returns its result, and has its share of what the call leaves in the cache."""
        case = self.model.split_checks.find(key)
        if case is None:
            return self._check(arguments, key)
        if not case.splits_tokens:
            return self.run_whole(arguments)
        undo = Snapshot([arguments])
        try:
            return self.run_tokens(arguments)
        except PlanFault as fault:
            undo.restore()
            self.model.split_checks.note(
                key, replace(case, splits_tokens=False), self.report(batch_of(arguments), fault.detail)
            )
        return self.run_whole(arguments)

    def run_whole(self, arguments: Arguments) -> Any:
        """Run any call on every rank, with the whole of all tensors of which ranks have shares."""
        if self.shares:
            change_tensors(arguments, lambda _, __, tensor: self.shares.whole(tensor, self.ranks))
        with raise_on_all_ranks():
            return self.call(arguments)

    def _check(self, arguments: Arguments, key: CaseKey) -> Any:
        """Run a call of a new case whole on every rank, then split with a copy of the cache; compare what they give.

        The caller's cache is that of the whole call.
        """
        checks, batch = self.model.split_checks, batch_of(arguments)
        copied = copy_objects(arguments)
        versions = [(each, each._version) for each in _tensors_of(copied)]
        module = ModuleSnapshot(self.model.module)
        is_training = any(each.training for each in self.model.module.modules())
        whole = self.run_whole(arguments)
        checks.count(key)
        tree = self._all_of(whole, arguments)
        structure = structure_of(tree, 0)
        reasons = {
            "it is in training mode: call eval()": is_training,
            "its forward writes to the tensors of its cache": any(each._version != n for each, n in versions),
            "its result or its cache holds what cannot be compared": structure is None,
        }
        for why, is_so in reasons.items():
            if not agree(not is_so):
                checks.note(key, Case(None), self.report(batch, why))
                return whole
        assert structure is not None
        if not agree(module.is_same and are_finite(tensors_of(tree))):
            return whole  # a table that is made once, or weights at fault: the next call of this case is checked again
        connect(self.model.device)
        try:
            split = self.run_tokens(copied, is_guarded=True)
            found = self.compare(
                self._all_of(split, copied), tree, structure, batch, is_same_module=agree(module.is_same)
            )
        except XditdError as fault:  # of the split alone: the class has taken these arguments
            found = self.report(batch, fault.detail)
        checks.note(key, Case(structure, 0, found.is_used), found)
        return whole

    def _all_of(self, result: Any, arguments: Arguments) -> Any:
        """Return a result and the cache after it as lists and maps, with the whole of all tensors."""
        assert self._cache is not None
        both = {"result": result, "cache": arguments.get(self._cache.argument)}
        return plain_tree(both, lambda tensor: self.shares.whole(tensor, self.ranks))


def _tensors_of(arguments: Arguments) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    plain_tree(arguments, found.append)
    return found
