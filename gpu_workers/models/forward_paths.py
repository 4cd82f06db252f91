"""Run each forward of a module on its path: as the class's own code, with compiled blocks, captured, or both.

The path of a case of forwards is chosen after its second eager run, between two commands of the daemon: it is captured
at once, and captured again when another process has compiled its blocks (``path_choice``).
"""

from __future__ import annotations

import hashlib
import logging
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.path_choice import Choice, Forward, ForwardCase, LastRun, PathChooser, bits_of
from xditd.gpu_workers.models.split_checks import CaseKey, ModuleSnapshot
from xditd.gpu_workers.packed.counts import PackedProductCounts
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.parallel.rank_sync import RankSet
from xditd.gpu_workers.parallel.row_trees import map_tensors, structure_of, tensors_of
from xditd.ipc import limits
from xditd.ipc.protocol import MAX_RELATIVE_ERROR
from xditd.ipc.status import ForwardPath

logger = logging.getLogger(__name__)

MAX_CAPTURED: Final = 8
"""Graphs of one module, as many of forwards that ranks run together as of others; the one that was used longest ago
goes first."""

MAX_CASES: Final = 256

MAX_INPUT_BYTES: Final = 2**30
"""Of the tensors of a forward that is not eager: their copies are what it is compared with."""

RUNS_BEFORE: Final = 2
"""Eager runs of a case before it is decided; with other weights of the same class one is enough."""

MAX_RUNS_BEFORE: Final = 4
"""A case stays eager if so many runs could not be compared: each changed the module, or had no room for copies."""

RUNS_AFTER_LOSS: Final = 8
"""Eager runs of a case whose graph made room for another one, before it is captured again: with more sizes in turn than
graphs, each call would be captured."""

MAX_VALUES: Final = 4
"""Decided cases that differ in numbers and texts alone. A caller that passes another number in every call, such as the
time of a step, would have a graph for each."""


@dataclass(frozen=True, eq=False)
class _Lent:
    """The tensors of a component as it was lent once, by name; empty once they are unmapped."""

    tensors: Mapping[str, torch.Tensor | PackedTensor]


_Key = tuple[_Lent, CaseKey, bool, Hashable]
"""Of a case: the weights, what the caller says, whether all ranks run it together, the layout of the arguments."""


class ForwardPaths:
    """The paths of the forwards of one module. ``mode`` is the setting ``acceleration``.

    Ranks ``among`` which a forward runs together (``on_all_ranks``) make the same calls of this, and take the same
    path. Graphs are of this object, and are freed when the weights are unmapped, or others are used more recently.
    ``blocks`` are the module's compiled blocks, or the reason why it has none. Replays of graphs add to ``counts``.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        class_name: str,
        device: torch.device,
        mode: str,
        *,
        is_leader: bool,
        among: RankSet = RankSet.GROUP,
        blocks: Callable[[], CompiledBlocks | str] = lambda: "it has no blocks to compile",
        counts: PackedProductCounts | None = None,
    ) -> None:
        self._class_name = class_name
        self._device = device
        self._is_leader = is_leader
        self._module = module
        self._chooser = PathChooser(module, device, mode, among, blocks, counts)
        # Those that all ranks run together apart from others: a rank that runs others has the same of these.
        self._cases: dict[bool, dict[_Key, ForwardCase]] = {True: {}, False: {}}
        self._known: dict[bool, dict[CaseKey, None]] = {True: {}, False: {}}
        """Cases that were due to be decided with some weights."""
        self._due: dict[int, tuple[ForwardCase, LastRun | None]] = {}
        """Cases that are due to be decided, by id, each with its last run, if that can be compared on this rank."""
        self._lent: dict[str, _Lent] = {}
        self._current: _Lent | None = None
        self._new: list[ForwardPath] = []
        self.launched = 0
        """Graphs that were launched for forwards."""

    @property
    def captures(self) -> bool:
        """Whether a forward may be captured."""
        return self._chooser.captures

    @property
    def compiles(self) -> bool:
        """Whether blocks may be compiled."""
        return self._chooser.compiles

    @property
    def is_on(self) -> bool:
        """Whether forwards have another path than the eager one."""
        return self._chooser.captures or self._chooser.compiles

    def use_weights(self, owner: str, tensors: Mapping[str, torch.Tensor | PackedTensor]) -> None:
        """Use the graphs of the weights that are in the module now: those of a component, as it was lent last.

        ``tensors`` is the same map each time, until its owner is lent anew, and is emptied when they are unmapped.
        """
        known = self._lent.get(owner)
        if known is None or known.tensors is not tensors:
            known = self._lent[owner] = _Lent(tensors)
        self._current = known
        self._due.clear()
        self._forget_gone()

    def run(
        self,
        key: CaseKey,
        arguments: Mapping[str, Any],
        eager: Forward,
        bare: Forward,
        *,
        on_all_ranks: bool,
        trial: Forward | None = None,
        note: str = "",
        may_compile: bool = True,
    ) -> Any:
        """Run a forward: ``eager(arguments)``, or on another path ``bare``, which does the same without any checks.

        ``key`` names the case: what ``eager`` depends on besides the contents and the layout of tensors. ``trial`` is
        ``bare`` with what it needs to raise on all ranks, or on none. Reports of the case have the ``note``.
        Without ``may_compile`` its blocks are not compiled.
        """
        if not self.is_on:
            return eager(arguments)
        assert self._current is not None
        layout = self._layout_of(arguments)
        case = self._find((self._current, key, on_all_ranks, layout))
        if case.graph is not None:
            result = case.graph.run(arguments)
            self.launched += 1
            if case.awaits_blocks:
                weights = self._current.tensors
                last = LastRun(case, bare, trial or bare, case.graph.arguments, result, weights)
                self._due[id(case)] = case, last
            return result
        if case.is_compiled:
            return self._chooser.run_compiled(case, lambda: eager(arguments))
        case.may_compile = may_compile
        case.runs += 1
        is_due = case.runs >= (1 if key in self._known[on_all_ranks] else RUNS_BEFORE)
        if case.is_decided or not is_due or not self._has_few(key, on_all_ranks=on_all_ranks):
            return eager(arguments)
        if _bytes_of(arguments) > MAX_INPUT_BYTES:
            return eager(arguments)
        self._note_known(key, on_all_ranks=on_all_ranks)
        shapes = _shapes_of(arguments)
        case.shapes = f"{note}: {shapes}" if note else shapes
        return self._run_to_decide(case, arguments, eager, bare, trial or bare)

    def note_eager(self, arguments: Mapping[str, Any], why: str) -> None:
        """Report once, for the status, that all ranks run forwards with such arguments eagerly, and why."""
        assert self._current is not None
        key = CaseKey.of(why, None, arguments, 0)
        case = self._find((self._current, key, True, self._layout_of(arguments)))
        if not case.is_decided:
            case.is_decided, case.shapes = True, _shapes_of(arguments)
            self._report(case, Choice(why), 0.0)

    def forget(self, layout: int) -> None:
        """Free the graphs of forwards with LoRAs of a layout, by its serial: the memory of their factors goes."""
        for cases in self._cases.values():
            for key in [key for key in cases if key[1].layout == layout]:
                self._due.pop(id(cases.pop(key)), None)
        for known in self._known.values():
            for case in [case for case in known if case.layout == layout]:
                del known[case]

    def drop_runs(self) -> None:
        """Decide nothing by the runs since the last ``decide``: ranks that failed in them may have other ones."""
        self._due.clear()

    @torch.no_grad()
    def decide(self) -> None:
        """Decide the cases that have run often enough. All ranks call this after the same jobs."""
        self._forget_gone()
        due, self._due = self._due, {}
        for case, run in due.values():
            if not self._chooser.agree(case, run is not None) or run is None:
                case.is_decided = case.runs >= MAX_RUNS_BEFORE
                if case.is_decided:
                    self._report(
                        case, Choice("its forwards change the module, or there is no memory to compare them"), 0.0
                    )
                continue
            began_s = time.perf_counter()
            choice = self._chooser.choose(run)
            self._drop_oldest()
            path = case.current_path
            if case.is_decided or path != case.path:
                case.path = path
                self._report(case, choice, time.perf_counter() - began_s)

    def close(self) -> None:
        """Free all graphs. With collectives in a graph, the process could not leave its group before."""
        self._due.clear()
        for cases in self._cases.values():
            cases.clear()

    def take_reports(self) -> tuple[ForwardPath, ...]:
        """Return the reports since the last call."""
        reports, self._new = self._new, []
        return tuple(reports)

    def _run_to_decide(
        self, case: ForwardCase, arguments: Mapping[str, Any], eager: Forward, bare: Forward, trial: Forward
    ) -> Any:
        assert self._current is not None
        self._due[id(case)] = case, None
        copied = _copy(arguments)
        if copied is None:
            return eager(arguments)
        snapshot = ModuleSnapshot(self._module)
        call = partial(eager, arguments)
        blocks = (
            self._chooser.find_blocks()
            if self._chooser.compiles and case.may_compile and not case.awaits_blocks
            else None
        )
        is_recorded = isinstance(blocks, CompiledBlocks) and blocks.state(case.compiled_key).phase == "absent"
        events = None
        if self._device.type == "cuda" and not is_recorded:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        began_s = time.perf_counter()
        if isinstance(blocks, CompiledBlocks):
            result = blocks.begin(case.compiled_key, call)
            case.awaits_blocks = True
        else:
            result = call()
        host_s = time.perf_counter() - began_s
        if events is not None:
            events[1].record()
        holds_objects = structure_of(result, 0) is None
        kept = None if holds_objects else _copy(result)
        # Of a forward that changes the module, further runs would change what later calls give.
        if (holds_objects or kept is not None) and snapshot.is_same:
            last = LastRun(case, bare, trial, copied, kept, self._current.tensors, host_s, events)
            self._due[id(case)] = case, last
        return result

    def _has_few(self, key: CaseKey, *, on_all_ranks: bool) -> bool:
        known = self._known[on_all_ranks]
        return key in known or sum(each.tensors == key.tensors for each in known) < MAX_VALUES

    def _note_known(self, key: CaseKey, *, on_all_ranks: bool) -> None:
        known = self._known[on_all_ranks]
        known.pop(key, None)
        known[key] = None
        while len(known) > MAX_CASES:
            del known[next(iter(known))]

    def _find(self, key: _Key) -> ForwardCase:
        cases = self._cases[key[2]]
        found = cases.pop(key, None) or ForwardCase(key[1:], key[2])
        cases[key] = found
        while len(cases) > MAX_CASES:
            del cases[next(iter(cases))]
        return found

    def _layout_of(self, arguments: Mapping[str, Any]) -> Hashable:
        """Return what a forward depends on besides the contents of tensors on its device: their layout, and others.

        Of others a digest: a key that held large ones would be kept.
        """
        return tuple(
            (tuple(each.shape), each.stride(), each.dtype, each.device, self._contents_of(each))
            for each in tensors_of(arguments)
        )

    def _contents_of(self, tensor: torch.Tensor) -> bytes | None:
        if tensor.device.type == self._device.type:
            return None
        return hashlib.blake2b(bits_of(tensor).cpu().numpy().tobytes(), digest_size=16).digest()

    def _forget_gone(self) -> None:
        """Free the graphs of weights that are unmapped, or were lent anew."""
        known = set(map(id, self._lent.values()))
        for owner in [owner for owner, lent in self._lent.items() if not lent.tensors]:
            known.discard(id(self._lent.pop(owner)))
        for cases in self._cases.values():
            for key in [key for key in cases if id(key[0]) not in known]:
                del cases[key]

    def _drop_oldest(self) -> None:
        """Free the graphs that were used longest ago; their cases are decided again when they run."""
        for cases in self._cases.values():
            captured = [case for case in cases.values() if case.graph is not None]
            for case in captured[:-MAX_CAPTURED]:
                case.graph, case.runs, case.is_decided = None, -RUNS_AFTER_LOSS, False

    def _report(self, case: ForwardCase, choice: Choice, took_s: float) -> None:
        if not self._is_leader and case.on_all_ranks:
            return
        found = ForwardPath(
            class_name=self._class_name,
            split="tokens" if case.on_all_ranks else "whole",
            shapes=case.shapes[:500],
            path=case.path,
            error=None if choice.error is None else min(choice.error, MAX_RELATIVE_ERROR),
            took_s=took_s,
            memory_bytes=choice.memory_bytes,
            detail=choice.reason[:1000],
        )
        self._new = [*self._new, found][-limits.MAX_FORWARD_PATHS :]
        logger.info(
            "path chosen class=%s split=%s path=%s error=%s took_s=%.2f memory_mib=%.0f shapes=%s %s",
            found.class_name, found.split, found.path, choice.error, took_s, found.memory_bytes / 2**20, found.shapes,
            found.detail,
        )  # fmt: skip


def _shapes_of(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{list(each.shape)}" for each in tensors_of(arguments))


def _bytes_of(arguments: Mapping[str, Any]) -> int:
    return sum(each.nbytes for each in tensors_of(arguments))


def _copy(tree: Any) -> Any:
    """Return a tree with copies of its tensors; ``None`` if there is no room for them."""
    try:
        return map_tensors(tree, torch.clone)
    except torch.OutOfMemoryError as full:
        traceback.clear_frames(full.__traceback__)
        return None
