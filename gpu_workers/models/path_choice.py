"""Choose the path of a case of forwards: eager, with compiled blocks, captured as a CUDA graph, or both.

A path is chosen if its results are those of the eager forward: for a graph the same bits, for compiled blocks within
what roundings alone change.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch

from xditd.gpu_workers.kernels.dense_products import measure_pending
from xditd.gpu_workers.models.captured_forward import CapturedForward, CaptureRefused
from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.entries import tensors_in
from xditd.gpu_workers.models.rounding_noise import rounding_noise
from xditd.gpu_workers.models.split_checks import Difference, ModuleSnapshot, computes_in_halves, largest_difference
from xditd.gpu_workers.packed.counts import PackedProductCounts
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.parallel.rank_sync import RankSet, agree
from xditd.gpu_workers.parallel.row_trees import structure_of, tensors_of
from xditd.ipc.errors import XditdError

Forward = Callable[[Mapping[str, Any]], Any]
Path = Literal["eager", "compiled", "captured", "compiled, captured"]

HOST_SHARE: Final = 0.3
"""A forward is captured if the host needs at least this share of its time to launch kernels; else a graph gains
nothing."""

LIMITING_SHARE: Final = 0.9
"""While its blocks are being compiled, a forward is captured only if the host needs at least this share of its time: it
is captured again when they are compiled."""


@dataclass(eq=False)
class ForwardCase:
    """A case of forwards with weights at certain addresses."""

    compiled_key: Hashable
    """The key of its graphs of blocks, which other weights share."""
    on_all_ranks: bool
    """Whether all ranks run it together."""
    runs: int = 0
    is_decided: bool = False
    awaits_blocks: bool = False
    """Whether its blocks are being compiled."""
    is_compiled: bool = False
    host_share: float | None = None
    """The part of its eager forward's time in which the host launched kernels; ``None`` if it is not known."""
    graph: CapturedForward | None = None
    """The graph that runs. It is that of the eager forward while blocks are being compiled."""
    may_compile: bool = True
    """False for forwards with what compiled blocks do not have: branches of LoRAs."""
    may_capture: bool = True
    """False once a capture was refused, or found to gain nothing."""
    path: Path = "eager"
    """The path that was reported last."""
    shapes: str = ""
    """The shapes of the tensors among its arguments, for reports."""

    def stay_eager(self) -> None:
        """Decide that the case stays eager, and free its graph."""
        self.is_decided, self.may_capture = True, False
        self.is_compiled, self.awaits_blocks, self.graph = False, False, None

    @property
    def current_path(self) -> Path:
        """The path that its next forward takes."""
        if self.is_compiled:
            return "compiled" if self.graph is None else "compiled, captured"
        return "eager" if self.graph is None else "captured"


@dataclass(frozen=True, eq=False)
class LastRun:
    """The last run of a case that is not decided: of the eager forward, or of its graph.

    ``arguments`` and ``result`` are copies; ``result`` is ``None`` if it holds objects. ``weights`` are the tensors of
    the component by name, not owned.
    """

    case: ForwardCase
    forward: Forward
    trial: Forward
    """The same forward, for runs that may fail on one rank: no other rank then waits for it."""
    arguments: Mapping[str, Any]
    result: Any
    weights: Mapping[str, torch.Tensor | PackedTensor]
    host_s: float = 0.0
    """How long the host launched its kernels, in seconds."""
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
    """The events before and after an eager run on a GPU. ``None`` for a run of a graph, and for one whose blocks were
    recorded, for which the host needs longer."""


class Choice(NamedTuple):
    """Why a case has no faster path, the error of its compiled blocks, and the bytes of a new graph."""

    reason: str
    error: float | None = None
    memory_bytes: int = 0


def compiles_blocks(mode: str, device: torch.device) -> bool:
    """Return whether blocks may be compiled with this setting of ``acceleration``."""
    return mode == "compiled" or (mode == "auto" and device.type == "cuda")


class PathChooser:
    """Compiles, captures and compares the forwards of one module. ``mode`` is the setting ``acceleration``.

    All ranks ``among`` which a forward runs together make the same choices in the same order. Replays of graphs add to
    ``counts``.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        device: torch.device,
        mode: str,
        among: RankSet,
        make_blocks: Callable[[], CompiledBlocks | str],
        counts: PackedProductCounts | None = None,
    ) -> None:
        self._module = module
        self._device = device
        self._among = among
        self._measures_host = mode == "auto" and device.type == "cuda"
        self._make_blocks = make_blocks
        self._counts = counts
        self._blocks: CompiledBlocks | str | None = None
        self.captures = device.type == "cuda" and mode in ("auto", "captured")
        self.compiles = compiles_blocks(mode, device)

    def find_blocks(self) -> CompiledBlocks | str:
        """Return the compiled blocks of the module, or the reason why it has none."""
        if self._blocks is None:
            self._blocks = self._make_blocks()
        return self._blocks

    def run_compiled(self, case: ForwardCase, call: Callable[[], Any]) -> Any:
        """Run the forward of a case with its compiled blocks."""
        assert isinstance(self._blocks, CompiledBlocks)
        return self._blocks.run(case.compiled_key, call)

    def choose(self, run: LastRun) -> Choice:
        """Choose the path of a case from its last run; ``case.is_decided`` says whether this is final.

        Raises:
            torch.OutOfMemoryError: in a forward of several ranks, which wait for this one.
        """
        try:
            return self._choose(run)
        except torch.OutOfMemoryError as full:
            if run.case.on_all_ranks:
                raise
            traceback.clear_frames(full.__traceback__)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        run.case.stay_eager()
        return Choice("there is no memory to compare it")

    def _choose(self, run: LastRun) -> Choice:
        case = run.case
        if not self.agree(case, run.result is not None):
            case.is_decided = True
            return Choice("its result holds objects")
        if self._measures_host and not self.agree(case, self._knows_host_share(run)):
            return Choice("its blocks were recorded")  # so that another run is needed
        reason, error = "", None
        if self.compiles and not case.may_compile:
            reason = "compiled blocks have no branches of LoRAs"
        elif self.compiles:
            blocks = self.find_blocks()
            if not self.agree(case, isinstance(blocks, CompiledBlocks)) or isinstance(blocks, str):
                reason = blocks if isinstance(blocks, str) else "another rank has no blocks to compile"
                case.awaits_blocks = False
            elif self.agree(case, blocks.state(case.compiled_key).phase != "making"):
                case.awaits_blocks = False
                reason, error = self._try_compiled(run, blocks)
        if self._device.type == "cuda":
            measure_pending(self._device)
        case.is_decided = not case.awaits_blocks
        if not self.captures or not case.may_capture or (case.graph is not None and not case.is_compiled):
            return Choice(reason, error)
        least = LIMITING_SHARE if case.awaits_blocks else HOST_SHARE
        if self._measures_host and not self.agree(case, (case.host_share or 0.0) >= least):
            case.graph = None
            return Choice(reason or f"the host needs less than {least:.0%} of its time", error)
        expected = run.result
        try:
            if case.is_compiled:
                expected = self.run_compiled(case, partial(run.trial, run.arguments))
            case.graph, why = self._capture(run, expected)
        except XditdError as fault:
            case.graph, why = None, fault.detail
        case.may_capture = case.graph is not None
        return Choice(reason or why, error, 0 if case.graph is None else case.graph.memory_bytes)

    def _try_compiled(self, run: LastRun, blocks: CompiledBlocks) -> tuple[str, float | None]:
        """Compare a forward with compiled blocks with the eager one; return why it is not used, and its error."""
        case = run.case
        state = blocks.state(case.compiled_key)
        if not self.agree(case, state.phase == "made"):
            return state.reason or "another rank has no compiled blocks", None
        call = partial(run.trial, run.arguments)
        try:
            found = blocks.run(case.compiled_key, call)
        except XditdError as fault:
            found, reason = None, fault.detail
        else:
            reason = "compiled blocks give other results"
        worst = Difference(float("inf"), 1.0)
        if found is not None and structure_of(found, 0) == structure_of(run.result, 0):
            worst = self._difference_of(found, run.result)
        is_near = worst.is_allowed
        is_finite = self.agree(case, math.isfinite(worst.error))
        if not self.agree(case, is_near) and is_finite and computes_in_halves(self._module):
            worst = worst.with_noise(self._noise(run))
        case.is_compiled = self.agree(case, worst.is_allowed)
        return ("" if case.is_compiled else reason), worst.error

    def _noise(self, run: LastRun) -> float:
        """Return how much roundings alone change a result; 0 if that cannot be measured."""
        try:
            with rounding_noise(self._module):
                noisy = run.trial(run.arguments)
        except XditdError:
            return 0.0
        return self._difference_of(noisy, run.result).error

    def _difference_of(self, found: Any, expected: Any) -> Difference:
        return largest_difference(found, expected, in_halves=computes_in_halves(self._module))

    def _capture(self, run: LastRun, expected: Any) -> tuple[CapturedForward | None, str]:
        """Capture a forward, and compare it with its run before; return why it is not captured."""
        case, snapshot = run.case, ModuleSnapshot(self._module)
        graph, reason = self._try_capture(run)
        if not self.agree(case, graph is not None):
            return None, reason or "another rank cannot capture it"
        assert graph is not None
        if not self.agree(case, snapshot.is_same):
            return None, "its forward changes the module"
        pairs = zip(tensors_of(graph.replay_last()), tensors_of(expected), strict=True)
        is_same = all(torch.equal(bits_of(found), bits_of(given)) for found, given in pairs)
        return (graph, "") if self.agree(case, is_same) else (None, "its graph gives other bits")

    def _try_capture(self, run: LastRun) -> tuple[CapturedForward | None, str]:
        forward = run.forward
        if run.case.is_compiled:
            eager = run.forward

            def forward(given: Mapping[str, Any]) -> Any:
                return self.run_compiled(run.case, partial(eager, given))

        try:
            weights = tensors_in(run.weights)
            return CapturedForward(forward, run.arguments, weights, self._device, self._counts), ""
        except CaptureRefused as refused:
            return None, str(refused)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None, "the GPU has no room for its graph"

    def _knows_host_share(self, run: LastRun) -> bool:
        """Note what part of an eager run's time the host needed; return whether that is known."""
        if run.events is not None:
            began, ended = run.events
            ended.synchronize()
            run.case.host_share = run.host_s * 1e3 / began.elapsed_time(ended)
        return run.case.host_share is not None

    def agree(self, case: ForwardCase, ok: bool) -> bool:
        """Return whether ``ok`` is true on all ranks that run the case together."""
        return agree(ok, self._among) if case.on_all_ranks else ok


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, which compare equal only if the tensors have the same bits."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
