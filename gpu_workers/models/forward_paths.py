"""Which way each forward of a module runs: as the class's own code, kernel by kernel (eager), or as a captured graph.

A case of forwards is captured after its second eager run, between two commands of the daemon, so that no job waits for
more than the capture. The graph then has to give the bits of the eager run before. What cannot be captured stays eager.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from xditd.gpu_workers.models.captured_forward import CapturedForward, CaptureRefused
from xditd.gpu_workers.models.split_checks import CaseKey, ModuleSnapshot
from xditd.gpu_workers.parallel.rank_sync import agree
from xditd.gpu_workers.parallel.row_trees import map_tensors, structure_of, tensors_of
from xditd.ipc import limits
from xditd.ipc.status import ForwardPath

logger = logging.getLogger(__name__)

Forward = Callable[[Mapping[str, Any]], Any]

MAX_CAPTURED: Final = 8
"""Graphs of one module; the one that was used longest ago goes first."""

MAX_CASES: Final = 256

MAX_INPUT_BYTES: Final = 2**30
"""Of the tensors of a forward that is captured: the graph has a copy of them."""

HOST_SHARE: Final = 0.3
"""A forward whose host launches kernels for less than this share of its time gains nothing from a graph."""

RUNS_BEFORE: Final = 2
"""Eager runs of a case before it is captured; with other weights of the same class one is enough."""

MAX_VALUES: Final = 4
"""Captured cases that differ in numbers and texts alone. A caller that passes another number in every call, such as the
time of a step, would have each captured."""


@dataclass(eq=False)
class _Case:
    """A case of forwards with weights at certain addresses."""

    runs: int = 0
    graph: CapturedForward | None = None
    is_refused: bool = False


@dataclass(frozen=True, eq=False)
class _Lent:
    """The tensors of a component as it was lent once, by name; empty once they are unmapped."""

    tensors: Mapping[str, torch.Tensor]


_Key = tuple[_Lent, CaseKey, bool, Hashable]
"""Of a case: the weights, what the caller says, whether all ranks run it together, the layout of the arguments."""


@dataclass(frozen=True, eq=False)
class _Wanted:
    """A forward that is to be captured, with the arguments and the result of its last eager run."""

    case: _Case
    forward: Forward
    arguments: Mapping[str, Any]
    result: Any
    on_all_ranks: bool
    host_s: float
    began: torch.cuda.Event
    ended: torch.cuda.Event


class ForwardPaths:
    """The ways of the forwards of one module. ``mode`` is the setting ``acceleration``.

    Ranks that run a forward together (``on_all_ranks``) make the same calls of this, and take the same way.
    """

    def __init__(
        self, module: torch.nn.Module, class_name: str, device: torch.device, mode: str, *, is_leader: bool
    ) -> None:
        self._module = module
        self._class_name = class_name
        self._device = device
        self._mode = mode
        self._is_leader = is_leader
        self._cases: dict[_Key, _Case] = {}
        self._known: dict[CaseKey, None] = {}
        """Cases that were captured with some weights."""
        self._wanted: list[_Wanted] = []
        self._lent: dict[str, _Lent] = {}
        self._current: _Lent | None = None
        self._new: list[ForwardPath] = []

    @property
    def is_on(self) -> bool:
        """Whether any forward is captured."""
        return self._device.type == "cuda" and self._mode in ("auto", "captured")

    def use_weights(self, owner: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Use the graphs of the weights that are in the module now: those of a component, as it was lent last.

        ``tensors`` is the same map each time, until its owner is lent anew, and is emptied when they are unmapped.
        """
        known = self._lent.get(owner)
        if known is None or known.tensors is not tensors:
            known = self._lent[owner] = _Lent(tensors)
        self._current = known
        self._wanted.clear()
        self._forget_gone()

    def run(
        self, key: CaseKey, arguments: Mapping[str, Any], eager: Forward, bare: Forward, *, on_all_ranks: bool
    ) -> Any:
        """Run a forward: ``eager(arguments)``, or a graph of ``bare``, which does the same without any checks.

        ``key`` names the case: what ``eager`` depends on besides the contents and the layout of tensors.
        """
        if not self.is_on:
            return eager(arguments)
        assert self._current is not None
        found = self._find((self._current, key, on_all_ranks, _layout_of(arguments)))
        if found.graph is not None:
            return found.graph.run(arguments)
        found.runs += 1
        is_due = found.runs >= (1 if key in self._known else RUNS_BEFORE) and not found.is_refused
        if not is_due or any(each.case is found for each in self._wanted) or not self._has_few(key):
            return eager(arguments)
        if sum(each.nbytes for each in tensors_of(arguments)) > MAX_INPUT_BYTES:
            found.is_refused = True
            return eager(arguments)
        copied = map_tensors(arguments, torch.clone)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        began_s = time.perf_counter()
        result = eager(arguments)
        host_s = time.perf_counter() - began_s
        ended.record()
        kept = map_tensors(result, torch.clone) if structure_of(result, 0) is not None else None
        self._wanted.append(_Wanted(found, bare, copied, kept, on_all_ranks, host_s, began, ended))
        self._known.pop(key, None)
        self._known[key] = None
        while len(self._known) > MAX_CASES:
            del self._known[next(iter(self._known))]
        return result

    def drop_wanted(self) -> None:
        """Capture nothing for the jobs until now: one that has failed may have failed on other ranks elsewhere."""
        self._wanted.clear()

    def make_ready(self) -> None:
        """Capture the forwards that have run often enough. All ranks call this after the same jobs."""
        self._forget_gone()
        while self._wanted:
            wanted = self._wanted.pop(0)
            began_s = time.perf_counter()
            reason, memory_bytes = self._capture(wanted)
            took_s = time.perf_counter() - began_s
            wanted.case.is_refused = bool(reason)
            self._report(wanted, reason, took_s, memory_bytes)

    def take_reports(self) -> tuple[ForwardPath, ...]:
        """Return the reports since the last call."""
        reports, self._new = self._new, []
        return tuple(reports)

    def _has_few(self, key: CaseKey) -> bool:
        return key in self._known or sum(each.tensors == key.tensors for each in self._known) < MAX_VALUES

    def _forget_gone(self) -> None:
        """Free the graphs of weights that are unmapped, or were lent anew."""
        known = set(map(id, self._lent.values()))
        for owner in [owner for owner, lent in self._lent.items() if not lent.tensors]:
            known.discard(id(self._lent.pop(owner)))
        for key in [key for key in self._cases if id(key[0]) not in known]:
            del self._cases[key]

    def _find(self, key: _Key) -> _Case:
        found = self._cases.pop(key, None) or _Case()
        self._cases[key] = found
        while len(self._cases) > MAX_CASES:
            del self._cases[next(iter(self._cases))]
        return found

    def _capture(self, wanted: _Wanted) -> tuple[str, int]:
        """Capture a forward and compare it with its eager run; return why it stays eager, and the bytes it takes."""
        together = agree if wanted.on_all_ranks else bool
        if not together(wanted.result is not None):
            return "its result holds objects", 0
        if not together(self._is_worth_it(wanted)):
            return f"the host needs less than {HOST_SHARE:.0%} of its time", 0
        snapshot = ModuleSnapshot(self._module)
        graph, reason = self._try(wanted)
        if not together(graph is not None):
            return reason or "another rank cannot capture it", 0
        assert graph is not None
        if not together(snapshot.is_same):
            return "its forward changes the module", 0
        result = graph.replay_last()
        expected = list(tensors_of(wanted.result))
        is_same = all(
            torch.equal(_bits(mine), _bits(its)) for mine, its in zip(tensors_of(result), expected, strict=True)
        )
        if not together(is_same):
            return "its graph gives other bits", 0
        wanted.case.graph = graph
        self._drop_oldest()
        return "", graph.memory_bytes

    def _try(self, wanted: _Wanted) -> tuple[CapturedForward | None, str]:
        try:
            with torch.no_grad():
                weights = list(self._current.tensors.values()) if self._current is not None else []
                return CapturedForward(wanted.forward, wanted.arguments, weights, self._device), ""
        except CaptureRefused as refused:
            return None, str(refused)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None, "the GPU has no room for its graph"

    def _is_worth_it(self, wanted: _Wanted) -> bool:
        if self._mode == "captured":
            return True
        wanted.ended.synchronize()
        return wanted.host_s * 1e3 >= HOST_SHARE * wanted.began.elapsed_time(wanted.ended)

    def _drop_oldest(self) -> None:
        captured = [case for case in self._cases.values() if case.graph is not None]
        for case in captured[:-MAX_CAPTURED]:
            case.graph, case.runs = None, 0

    def _report(self, wanted: _Wanted, reason: str, took_s: float, memory_bytes: int) -> None:
        if not self._is_leader and wanted.on_all_ranks:
            return
        shapes = [f"{list(each.shape)}" for each in tensors_of(wanted.arguments)]
        found = ForwardPath(
            class_name=self._class_name,
            split="tokens" if wanted.on_all_ranks else "whole",
            shapes=", ".join(shapes)[:500],
            path="eager" if reason else "captured",
            took_s=took_s,
            memory_bytes=memory_bytes,
            detail=reason[:1000],
        )
        self._new = [*self._new, found][-limits.MAX_FORWARD_PATHS :]
        logger.info(
            "path chosen class=%s split=%s path=%s took_s=%.2f memory_mib=%.0f shapes=%s %s",
            found.class_name, found.split, found.path, took_s, memory_bytes / 2**20, found.shapes, found.detail,
        )  # fmt: skip


def _layout_of(arguments: Mapping[str, Any]) -> Hashable:
    """Return what of the arguments' tensors a graph depends on: those on the GPU by layout, others by their values."""
    return tuple(
        (tuple(each.shape), each.stride(), each.dtype, None if each.is_cuda else _bits(each).numpy().tobytes())
        for each in tensors_of(arguments)
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
