"""Run the parts of a call of a module, and the rows of a part, on different ranks ("by rows"), or split their tokens.

Parts with objects run on every rank, since all ranks hold the same ones. So do the first call of each case, which is
checked, and those that the checks have refused. Of all others, ranks run whole rows and send their results to rank 0,
or they share the tokens of every row, by the class's token plan, whichever gives the busiest rank less to do. Parts
with a cache that the token plan declares have their tokens split.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch

from xditd.gpu_workers.jobs.cached_calls import CachedCalls
from xditd.gpu_workers.jobs.case_checks import CaseChecks
from xditd.gpu_workers.jobs.numerics import use_numerics
from xditd.gpu_workers.jobs.split_runs import run_split
from xditd.gpu_workers.models.class_layout import SeparateLayout
from xditd.gpu_workers.models.class_model import ClassModel
from xditd.gpu_workers.models.split_checks import Case, CaseKey
from xditd.gpu_workers.models.token_plans import PlanFault
from xditd.gpu_workers.parallel.rank_sync import agree, raise_on_all_ranks
from xditd.gpu_workers.parallel.row_gather import Piece, Share, Transfer, assign
from xditd.gpu_workers.parallel.row_trees import (
    Node,
    batch_of,
    build,
    copy_tree,
    join,
    leaves_of,
    structure_of,
    structure_of_rows,
    take_rows,
    tensors_of,
)
from xditd.gpu_workers.parallel.split_choice import prefers_tokens
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.gpu_workers.parallel.token_shares import TokenShares
from xditd.ipc.errors import BadRequest, OutOfMemory
from xditd.ipc.job_parts import Numerics

Forward = Callable[[Mapping[str, Any]], Any]
_REFUSED: Final = object()
"""In place of a result: the class has refused some rows alone."""


@dataclass(frozen=True)
class ModulePart:
    """One forward. ``on_all_ranks``: every rank has to run it, since it changes objects that all ranks hold;
    ``stateful`` names the arguments that hold these."""

    arguments: Mapping[str, Any]
    on_all_ranks: bool
    stateful: frozenset[str] = frozenset()


class PreparedParts(NamedTuple):
    """The parts of a call, and of each whether its cache may be split, and its case: both empty with one rank."""

    parts: Sequence[ModulePart]
    has_cache: Sequence[bool] = ()
    keys: Sequence[CaseKey] = ()


class ModuleRows:
    """Runs the parts of one call: ``call`` runs ``method`` of ``model`` with the arguments of a part.

    ``call`` raises ``Unsupported`` for a forward that draws random numbers of torch's own generators. ``shares`` knows
    the tensors of which ranks have shares. With ``has_loras`` forwards run neither compiled nor captured, but for those
    after :meth:`use_layout`, which may be captured. All ranks make the same calls.
    """

    def __init__(
        self,
        model: ClassModel,
        method: str,
        numerics: Numerics,
        call: Forward,
        shares: TokenShares | None = None,
        *,
        has_loras: bool = False,
    ) -> None:
        self._model = model
        self._method = method
        self._numerics = numerics
        self._call = call
        self._has_paths = method == "forward" and not has_loras
        self._layout: SeparateLayout | None = None
        self._rank = model.layout.rank
        self._ranks = model.layout.world_size
        self._shares = TokenShares() if shares is None else shares
        self._checks = CaseChecks(model, method, numerics, call, self._run_tokens)
        self._cached = CachedCalls(
            model,
            self._shares,
            model.ranks,
            call,
            self._run_tokens,
            self._checks.compare_tokens,
            lambda batch, why: self._checks.report("tokens", batch, None, why),
        )

    def use_layout(self, layout: SeparateLayout | None) -> None:
        """Let the forwards with LoRAs read their factors where a layout has them, if it does."""
        self._layout = layout if self._method == "forward" else None
        self._has_paths = self._has_paths or self._layout is not None

    def run(self, parts: Sequence[ModulePart]) -> list[Any]:
        """Return the result of each part on rank 0; on other ranks ``None`` for those that not all have run.

        If one rank fails, all ranks raise.

        Raises:
            BadRequest: the class refused the arguments.
            Unsupported: the forward cannot run in workers.
            OutOfMemory, OtherRankFailed: see ``raise_on_all_ranks``.
        """
        with raise_on_all_ranks():
            prepared = self.prepare(parts)
        return self.run_prepared(prepared)

    def prepare(self, parts: Sequence[ModulePart]) -> PreparedParts:
        """Do what comes before the forwards; call this within ``raise_on_all_ranks``, it may fail on one rank alone."""
        if self._ranks == 1:
            return PreparedParts(parts)
        has_cache = [self._has_cache(part) for part in parts]
        keys = [self._key(part.arguments, has_cache=has) for part, has in zip(parts, has_cache, strict=True)]
        return PreparedParts(parts, has_cache, keys)

    def run_prepared(self, prepared: PreparedParts) -> list[Any]:
        """Do the rest of :meth:`run`."""
        parts, has_cache, keys = prepared
        if self._ranks == 1:
            with raise_on_all_ranks():
                return [self._run_alone(part) for part in parts]
        results: list[Any] = [None] * len(parts)
        shared: dict[int, Case] = {}
        for number, part in enumerate(parts):
            if has_cache[number]:
                results[number] = self._cached.run(part.arguments, keys[number])
                continue
            case = Case(None) if part.on_all_ranks else self._model.split_checks.find(keys[number])
            if case is None:
                results[number] = self._checks.check(part.arguments, keys[number])
            elif case.result is None:
                results[number] = self._run_whole(part, keys[number])
            else:
                shared[number] = case
        if self._prefers_tokens(parts, shared):
            for number, case in shared.items():
                results[number] = self._run_tokens_or_whole(parts[number].arguments, keys[number], case)
            return results
        for number, result in self._run_shared(parts, keys, shared).items():
            results[number] = result
        return results

    def _run_alone(self, part: ModulePart) -> Any:
        """Run a part on the only rank."""
        if part.on_all_ranks or not self._model.paths.is_on or not self._has_paths:
            return self._call(part.arguments)
        # A batch of 0: no rows are split, so nothing has to wait for the device to know which of them are alike.
        return self._run_path(part.arguments, CaseKey.of(self._method, self._numerics, part.arguments, 0))

    def _run_whole(self, part: ModulePart, key: CaseKey) -> Any:
        """Run a part on every rank."""
        if part.on_all_ranks or self._shares:
            return self._cached.run_whole(part.arguments)
        with raise_on_all_ranks():
            return self._run_path(part.arguments, key)

    def _run_path(self, arguments: Mapping[str, Any], key: CaseKey) -> Any:
        """Run a forward that this rank computes alone, on its path."""
        if not self._has_paths:
            return self._call(arguments)
        return self._on_path(key, arguments, self._call, self._bare, self._try, on_all_ranks=False)

    def _on_path(
        self,
        key: CaseKey,
        arguments: Mapping[str, Any],
        eager: Forward,
        bare: Forward,
        trial: Forward,
        *,
        on_all_ranks: bool,
    ) -> Any:
        layout, given = self._layout, (key, arguments, eager, bare)
        if layout is None:
            return self._model.paths.run(*given, on_all_ranks=on_all_ranks, trial=trial)
        return self._model.loras.run(layout, *given, on_all_ranks=on_all_ranks, trial=trial)

    def _bare(self, arguments: Mapping[str, Any]) -> Any:
        """Run the module without the checks of ``call``."""
        with use_numerics(self._numerics, self._model.device):
            return self._model.module(**arguments)

    def _try(self, arguments: Mapping[str, Any]) -> Any:
        """Run a part outside of a job, with the errors of one."""
        try:
            with use_numerics(self._numerics, self._model.device):
                return self._call(arguments)
        except torch.OutOfMemoryError as full:
            traceback.clear_frames(full.__traceback__)
            raise OutOfMemory("the GPU has no room to compare it") from None

    def _prefers_tokens(self, parts: Sequence[ModulePart], cases: Mapping[int, Case]) -> bool:
        return all(case.splits_tokens for case in cases.values()) and prefers_tokens(_shares(parts, cases), self._ranks)

    def _has_cache(self, part: ModulePart) -> bool:
        """Return whether a part may be split though it changes an object: a cache that the token plan declares."""
        return self._method == "forward" and self._cached.has(part.arguments, part.stateful)

    def _key(self, arguments: Mapping[str, Any], *, has_cache: bool) -> CaseKey:
        described = self._cached.describe(arguments) if has_cache else arguments
        return CaseKey.of(self._method, self._numerics, described, batch_of(arguments))

    def _run_tokens_or_whole(self, arguments: Mapping[str, Any], key: CaseKey, case: Case) -> Any:
        """Run a call with its tokens split; if it is not as the plan declares, whole on every rank from now on."""
        copied = copy_tree(arguments)
        try:
            return self._run_tokens(arguments, key)
        except PlanFault as fault:
            self._model.paths.drop_runs()  # of those ranks that have found no fault
            report = self._checks.report("tokens", batch_of(copied), None, fault.detail)
            self._model.split_checks.note(key, replace(case, splits_tokens=False), report)
        with raise_on_all_ranks():
            return self._call(copied)

    def _run_tokens(self, arguments: Mapping[str, Any], key: CaseKey | None = None, *, is_guarded: bool = False) -> Any:
        """Run a call with its tokens split over all ranks; every rank returns the whole result.

        Without a ``key`` it is eager.

        All ranks meet in the middle of the forward, so that one without memory ends the group: its error is not shared.
        """
        planned = self._model.planned
        assert not isinstance(planned, str)
        ranks = self._model.ranks

        def run(on: Ranks) -> Any:
            def eager(given: Mapping[str, Any]) -> Any:
                return planned.run(lambda: self._call(given), on, self._shares)

            def bare(given: Mapping[str, Any]) -> Any:
                return planned.run(lambda: self._bare(given), on, self._shares)

            def trial(given: Mapping[str, Any]) -> Any:
                def guarded(all_ranks: Ranks) -> Any:
                    return planned.run(lambda: self._try(given), all_ranks, self._shares)

                return run_split(guarded, ranks, is_guarded=True)

            if key is None or not self._has_paths:
                return eager(arguments)
            return self._on_path(key, arguments, eager, bare, trial, on_all_ranks=True)

        return run_split(run, ranks, is_guarded=is_guarded)

    def _run_shared(
        self, parts: Sequence[ModulePart], keys: Sequence[CaseKey], cases: Mapping[int, Case]
    ) -> dict[int, Any]:
        """Run parts on different ranks; a part whose result differs in structure from the checked one on all ranks."""
        if not cases:
            return {}
        pieces = assign(_shares(parts, cases), self._ranks)
        nodes = {piece: structure_of_rows(_structure(cases[piece.part]), piece.rows) for piece in pieces}
        with raise_on_all_ranks():
            mine = {
                piece: self._run_piece(piece, parts[piece.part], keys[piece.part])
                for piece in pieces
                if piece.rank == self._rank
            }
        differing = {piece.part for piece, found in mine.items() if structure_of(found, 0) != nodes[piece]}
        wrong = [] if agree(not differing) else [number for number in cases if not agree(number not in differing)]
        results: dict[int, Any] = {}
        for number in wrong:
            why = "a later call had a result of another structure, or its rows were refused"
            self._model.split_checks.note(
                keys[number], Case(None), self._checks.report("rows", cases[number].batch, None, why)
            )
            with raise_on_all_ranks():
                results[number] = self._call(parts[number].arguments)
        pieces = [piece for piece in pieces if piece.part not in wrong]
        with raise_on_all_ranks():
            transfer = Transfer(self._rank, self._model.device)
            for piece in pieces:
                transfer.add(piece, leaves_of(nodes[piece]), tensors_of(mine.get(piece)))
        transfer.run()
        with raise_on_all_ranks():
            if self._rank == 0:
                for number in cases.keys() - set(wrong):
                    found = [build(nodes[each], iter(transfer.tensors[each])) for each in pieces if each.part == number]
                    results[number] = join(_structure(cases[number]), found)
        return results

    def _run_piece(self, piece: Piece, part: ModulePart, key: CaseKey) -> Any:
        """Return the result of some rows; :data:`_REFUSED` if the class refuses them, which may take all rows."""
        batch = batch_of(part.arguments)
        if len(piece.rows) >= batch:
            return self._run_path(copy_tree(part.arguments), key)
        try:
            return self._run_path(take_rows(part.arguments, batch, slice(piece.rows.start, piece.rows.stop)), key)
        except BadRequest:
            return _REFUSED


def _shares(parts: Sequence[ModulePart], cases: Mapping[int, Case]) -> list[Share]:
    return [Share(number, max(batch_of(parts[number].arguments), 1), case.batch > 1) for number, case in cases.items()]


def _structure(case: Case) -> Node:
    assert case.result is not None
    return case.result
