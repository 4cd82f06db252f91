"""Check the first call of each case: run it whole on every rank, then by rows and by tokens, and compare the results.

All ranks make the same calls, and note the same verdicts.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from functools import cache, partial
from operator import attrgetter
from typing import Any, Final, Literal

import torch

from xditd.gpu_workers.models.class_model import ClassModel
from xditd.gpu_workers.models.finite import are_finite
from xditd.gpu_workers.models.rounding_noise import rounding_noise
from xditd.gpu_workers.models.split_checks import (
    TOLERANCE,
    TOLERANCE_OF_HALVES,
    Case,
    CaseKey,
    Difference,
    ModuleSnapshot,
    computes_in_halves,
    largest_difference,
)
from xditd.gpu_workers.parallel.rank_sync import agree, gather_bytes, raise_on_all_ranks
from xditd.gpu_workers.parallel.row_gather import connect, pieces_of
from xditd.gpu_workers.parallel.row_trees import (
    Node,
    batch_of,
    copy_tree,
    structure_of,
    structure_of_rows,
    take_rows,
    tensors_of,
)
from xditd.ipc.errors import XditdError
from xditd.ipc.job_parts import Numerics
from xditd.ipc.protocol import MAX_RELATIVE_ERROR
from xditd.ipc.status import SplitCheck

_DIFFERENCE: Final = struct.Struct("dd")
_DIGEST_BYTES: Final = 16


class CaseChecks:
    """Checks the calls of one method of ``model``; the verdicts are in ``model.split_checks``.

    ``call`` runs the method as the class does, and ``run_tokens`` with its tokens split over all ranks.
    """

    def __init__(
        self,
        model: ClassModel,
        method: str,
        numerics: Numerics,
        call: Callable[[Mapping[str, Any]], Any],
        run_tokens: Callable[..., Any],
    ) -> None:
        self._model = model
        self._method = method
        self._numerics = numerics
        self._call = call
        self._run_tokens = run_tokens
        self._rank = model.layout.rank
        self._ranks = model.layout.world_size

    def check(self, arguments: Mapping[str, Any], key: CaseKey) -> Any:
        """Run a call of a new case whole on every rank, then by rows; note whether the results agree."""
        checks, batch = self._model.split_checks, batch_of(arguments)
        copied = copy_tree(arguments)  # a forward may change its lists and maps
        snapshot = ModuleSnapshot(self._model.module)
        is_training = any(each.training for each in self._model.module.modules())
        with raise_on_all_ranks():
            whole = self._call(arguments)
        structure = structure_of(whole, batch)
        if not agree(structure is not None and not is_training):
            why = "it is in training mode: call eval()" if is_training else "its result holds objects"
            checks.note(key, Case(None), self.report("rows", batch, None, why))
            return whole
        assert structure is not None
        if not agree(are_finite(tensors_of(whole))):
            return whole  # the weights may be at fault: the next call of this case is checked again
        checks.count(key)
        if not agree(snapshot.is_same):
            return whole  # a table that is made once, or a state that each call changes: the next check shows which
        pieces = pieces_of(batch, self._ranks)
        found, why = Difference(0.0, self._tolerance), ""
        if batch > 1 and self._rank < len(pieces):
            found, why = self._compare_rows(copied, whole, structure, pieces[self._rank])
            if not snapshot.is_same:
                found, why = Difference(math.inf, self._tolerance), "its forward changes the module"
        worst = self._worst(found, structure)
        connect(self._model.device)
        if worst is None:
            checks.note(key, Case(None), self.report("rows", batch, None, "ranks have results of other structures"))
            return whole
        noise = cache(partial(self._noise, copied, whole, structure))
        worst = self._allow_noise(worst, noise)
        reports = []
        has_rows = batch > 1 and worst.ratio <= 1.0
        if batch > 1:
            why = "" if has_rows else why or "rows that run apart give other results"
            reports.append(self.report("rows", batch, worst, why))
        by_tokens = self._check_tokens(copied, whole, structure, batch, noise)
        if by_tokens is not None:
            reports.append(by_tokens)
        splits_tokens = by_tokens is not None and by_tokens.is_used
        checks.note(key, Case(structure, batch if has_rows else 0, splits_tokens), *reports)
        return whole

    def compare_tokens(
        self,
        split: Any,
        whole: Any,
        structure: Node,
        batch: int,
        *,
        is_same_module: bool,
        noise: Callable[[], float] | None = None,
    ) -> SplitCheck:
        """Compare the results of split tokens and of the class on all ranks together.

        ``noise`` measures what roundings alone change, if it is needed.
        """
        found, why = Difference(math.inf, self._tolerance), "its result has another structure"
        if structure_of(split, batch) == structure:
            found, why = self._difference_of(split, whole), "split tokens give other results"
        if not is_same_module:
            found, why = Difference(math.inf, self._tolerance), "its forward changes the module"
        worst = self._worst(found, structure)
        if worst is None:
            return self.report("tokens", batch, None, "ranks have results of other structures")
        if noise is not None:
            worst = self._allow_noise(worst, noise)
        return self.report("tokens", batch, worst, "" if worst.ratio <= 1.0 else why)

    def report(self, split: Literal["rows", "tokens"], batch: int, found: Difference | None, why: str) -> SplitCheck:
        """Describe a check: ``why`` such calls are not split so is empty if they are, and ``found`` may be unknown."""
        error = None if found is None or not math.isfinite(found.error) else min(found.error, MAX_RELATIVE_ERROR)
        return SplitCheck(
            class_name=self._model.class_name,
            method=self._method,
            split=split,
            batch=batch,
            error=error,
            tolerance=self._tolerance if found is None else found.tolerance,
            is_used=not why,
            detail=why[:1000],
        )

    def _check_tokens(
        self, arguments: Mapping[str, Any], whole: Any, structure: Node, batch: int, noise: Callable[[], float]
    ) -> SplitCheck | None:
        """Run a call with its tokens split over all ranks, and compare; ``None`` if the module has no token plan."""
        if isinstance(self._model.planned, str) or self._method != "forward":
            return None
        snapshot = ModuleSnapshot(self._model.module)
        try:
            split = self._run_tokens(copy_tree(arguments), is_guarded=True)
        except XditdError as fault:  # of the split alone: the class has taken these arguments
            return self.report("tokens", batch, None, fault.detail)
        return self.compare_tokens(split, whole, structure, batch, is_same_module=snapshot.is_same, noise=noise)

    @property
    def _tolerance(self) -> float:
        return TOLERANCE_OF_HALVES if self._in_halves else TOLERANCE

    @property
    def _in_halves(self) -> bool:
        is_cast = self._numerics.autocast is not None and self._numerics.autocast != "float32"
        return is_cast or computes_in_halves(self._model.module)

    def _compare_rows(
        self, arguments: Mapping[str, Any], whole: Any, structure: Node, rows: range
    ) -> tuple[Difference, str]:
        """Run some rows, and compare them with those of the whole; return the difference, and what is wrong.

        Raises nothing that only this rank would raise: the others wait for its difference.
        """
        batch = batch_of(arguments)
        unknown = Difference(math.inf, self._tolerance)
        try:
            piece = self._call(take_rows(arguments, batch, slice(rows.start, rows.stop)))
            if structure_of(piece, 0) != structure_of_rows(structure, rows):
                return unknown, "a result has other dimensions or values for some rows alone"
            return self._difference_of(piece, take_rows(whole, batch, slice(rows.start, rows.stop))), ""
        except torch.OutOfMemoryError:
            return unknown, "no room to check them"
        except XditdError as error:
            return unknown, error.detail

    def _difference_of(self, found: Any, expected: Any) -> Difference:
        return largest_difference(found, expected, in_halves=self._in_halves)

    def _worst(self, mine: Difference, structure: Node) -> Difference | None:
        """Return the largest difference of all ranks; ``None`` if their whole results have other structures."""
        digest = hashlib.blake2b(repr(structure).encode(), digest_size=_DIGEST_BYTES).digest()
        packed = _DIFFERENCE.pack(*mine) + digest
        everyone = gather_bytes(packed, len(packed), self._ranks)
        if any(each[_DIFFERENCE.size :] != digest for each in everyone):
            return None
        found = (Difference(*_DIFFERENCE.unpack(each[: _DIFFERENCE.size])) for each in everyone)
        return max(found, key=attrgetter("ratio"))

    def _allow_noise(self, worst: Difference, noise: Callable[[], float]) -> Difference:
        """Raise the tolerance of a difference in halves that exceeds it, to what roundings alone change; on all ranks.

        A fixed tolerance cannot tell a model that makes much of roundings from a wrong result.
        """
        if worst.ratio <= 1.0 or not self._in_halves or not math.isfinite(worst.error):
            return worst
        return worst.with_noise(noise())

    def _noise(self, arguments: Mapping[str, Any], whole: Any, structure: Node) -> float:
        """Run a call whole once more, with the last places of its products changed; return the error of the result."""
        with raise_on_all_ranks(), rounding_noise(self._model.module):
            noisy = self._call(copy_tree(arguments))
        found = math.inf
        if structure_of(noisy, batch_of(arguments)) == structure:
            found = self._difference_of(noisy, whole).error
        worst = self._worst(Difference(found, 1.0), structure)
        return 0.0 if worst is None or not math.isfinite(worst.error) else worst.error
