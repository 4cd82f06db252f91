"""Run a module with its repeated blocks compiled, on one rank and with tokens split over ranks.

A graph is recorded while an eager forward runs (``begin``), compiled in another process, and used by the forwards that
ask for it (``run``), in every block that computes the same operations on tensors of the same sizes. Weights are inputs
of the graph, so a swap compiles nothing. Attention stays outside of it (``attention_operator``): the plan of the
forward, or the class's own function, computes it. Hooks on blocks run as always, around what is compiled.

Every other call of a block is eager, in the same forward: nothing waits, and nothing is compiled in this process. Ranks
need not agree: compiled and eager blocks exchange tokens alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Final, Literal

import torch

from xditd.gpu_workers.models.block_arguments import take_tensors
from xditd.gpu_workers.models.block_attention import AttentionFunctions
from xditd.gpu_workers.models.block_compiler import one_line
from xditd.gpu_workers.models.block_graphs import NotCompiled, digest_of
from xditd.gpu_workers.models.block_recorder import BlockRecorder
from xditd.gpu_workers.models.block_runs import BlockRun, CompiledCall
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.repeated_blocks import find_blocks, why_not
from xditd.gpu_workers.models.snapshots import Snapshot
from xditd.ipc.errors import Unsupported, XditdError

logger = logging.getLogger(__name__)

MAX_KEYS: Final = 16
"""The most keys of ``begin`` for which graphs are held."""

IDLE_S: Final = 600.0
"""A key that no forward has used for so long may be replaced by another one."""

MAX_CALLS: Final = 64
"""The most different calls of blocks in one forward that are compiled. Classes in the tests have at most 8."""


@dataclass(frozen=True, slots=True)
class CompiledState:
    """The state of the graphs of a key.

    ``made``: each is made, or has failed for the ``reason``, and at least one can be used. ``failed``: none can.
    ``seconds`` is how long they took together, ``graphs`` how many can be used.
    """

    phase: Literal["absent", "making", "made", "failed"]
    reason: str = ""
    graphs: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Key:
    calls: dict[Hashable, CompiledCall | str] = field(default_factory=dict)
    """The calls of blocks in its forward, or the reasons why they are not compiled."""
    used_s: float = 0.0


class CompiledBlocks:
    """The repeated blocks of a module, eager and compiled. One thread runs all forwards of a process, and calls this.

    ``variant`` returns what a forward depends on besides its arguments: in one variant blocks may have other attributes
    than in another, and then graphs of their own. ``eager`` and ``compiled`` count the calls of blocks in ``run``.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        blocks: Mapping[str, torch.nn.Module],
        planned: PlannedModule | None,
        graphs: CompiledGraphs,
        variant: Callable[[], Hashable] = lambda: None,
    ) -> None:
        self._module = module
        self._planned = planned
        self._graphs = graphs
        self._functions = AttentionFunctions()
        self._keys: dict[Hashable, _Key] = {}
        self._calls: dict[Hashable, CompiledCall | str] = {}
        self._variant = variant
        self._groups: dict[Hashable, int] = {}
        self._blocks = [BlockRun(path, each) for path, each in blocks.items()]
        self._note_variant()
        self._split_fault = self._find_split_fault()
        self.eager = 0
        self.compiled = 0

    @classmethod
    def of(
        cls,
        module: torch.nn.Module,
        planned: PlannedModule | str | None,
        graphs: CompiledGraphs,
        variant: Callable[[], Hashable] = lambda: None,
    ) -> CompiledBlocks | str:
        """Return the compiled blocks of a module, with its plan if it has one, or the reason why it has none."""
        blocks = find_blocks(module)
        if isinstance(blocks, str):
            return blocks
        if faults := list(filter(None, map(why_not, blocks.values()))):
            return faults[0]
        return cls(module, blocks, planned if isinstance(planned, PlannedModule) else None, graphs, variant)

    def begin(self, key: Hashable, call: Callable[[], Any]) -> Any:
        """Run an eager forward (``call``, which may split its tokens), record it, and begin to make its graphs.

        Return its result. A key that is known, or for which there is no room, runs eager and nothing else. What cannot
        be compiled becomes the reason of ``state``; only ``call`` raises.
        """
        if key in self._keys or not self._has_room():
            return call()
        if torch.is_grad_enabled():
            self._keys[key] = _Key({"all": "gradients are enabled"}, time.monotonic())
            return call()
        self._note_variant()
        noted = _Key(used_s=time.monotonic())
        new: dict[str, bytes] = {}
        with self._in_place(partial(self._record, noted, new)):
            result = call()
        self._keys[key] = noted  # not of a forward that has failed
        self._calls.update(noted.calls)
        self._graphs.make(new)
        return result

    def state(self, key: Hashable) -> CompiledState:
        """Return the state of the graphs of a key. It never waits."""
        noted = self._keys.get(key)
        if noted is None:
            return CompiledState("absent", "" if self._has_room() else f"{MAX_KEYS} others are held")
        reasons = [each for each in noted.calls.values() if isinstance(each, str)]
        names = {each.name for each in noted.calls.values() if not isinstance(each, str)}
        found = [state for state in map(self._graphs.find, names) if state is not None]
        reasons += [each.reason for each in found if each.phase == "failed"]
        made = [each for each in found if each.phase == "made"]
        reason = reasons[0] if reasons else "" if names else "no block was called"
        if any(each.phase == "making" for each in found):
            return CompiledState("making", reason, len(made))
        return CompiledState(
            "made" if made else "failed", reason, len(made), round(sum(each.seconds for each in made), 3)
        )

    def run(self, key: Hashable, call: Callable[[], Any]) -> Any:
        """Run a forward with compiled blocks wherever the graph of a block's call is made, and all others eager.

        Raises:
            NotCompiled: with tokens split, a graph failed after ranks had exchanged tokens. It is not used again.
        """
        if (noted := self._keys.get(key)) is not None:
            noted.used_s = time.monotonic()
        if torch.is_grad_enabled() or self._module.training:
            return call()
        with self._in_place(self._run):
            return call()

    def forget(self, key: Hashable) -> None:
        """Drop the graphs of a key. Graphs on disk stay."""
        self._keys.pop(key, None)
        held = {each for noted in self._keys.values() for each in noted.calls}
        self._calls = {each: found for each, found in self._calls.items() if each in held}

    def _has_room(self) -> bool:
        """Return whether another key can be held; forget the one that was used longest ago if there are too many."""
        if len(self._keys) < MAX_KEYS:
            return True
        oldest = min(self._keys, key=lambda each: self._keys[each].used_s)
        if time.monotonic() - self._keys[oldest].used_s < IDLE_S:
            return False
        self.forget(oldest)
        return True

    def _note_variant(self) -> None:
        """Note the blocks as they are in the variant that runs now, if it is new."""
        variant = self._variant()
        for block in self._blocks:
            block.note(variant, self._groups)

    @property
    def _is_split(self) -> bool:
        """Whether the forward that runs now splits its tokens."""
        return self._planned is not None and self._planned.current is not None

    def _find_split_fault(self) -> str:
        """Return why blocks cannot be compiled while tokens are split, or an empty text."""
        if self._planned is None:
            return ""
        hooked = set(self._planned.hooked)
        inside = {each for block in self._blocks for each in block.module.modules() if each is not block.module}
        return "its tokens are split or exchanged inside of a block" if hooked & inside else ""

    @contextmanager
    def _in_place(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Let ``forward`` run each call of a block; it takes the block, its own forward, and the arguments."""
        try:
            for block in self._blocks:
                own = block.module.forward
                block.module.__dict__["forward"] = wraps(own)(partial(forward, block, own))
            yield
        finally:
            for block in self._blocks:
                block.module.__dict__.pop("forward", None)

    def _call_key(self, block: BlockRun, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Hashable:
        """Return what a graph depends on; tensors of the arguments are added to ``tensors``.

        Raises:
            NotCompiled: an argument is an object.
        """
        values = take_tensors((args, kwargs), tensors)
        kind = tensors[0].device.type if tensors else "cpu"
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return block.group(self._variant()), values, cast, self._is_split

    def _record(
        self, noted: _Key, new: dict[str, bytes], block: BlockRun, own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        tensors: list[torch.Tensor] = []
        try:
            call_key = self._call_key(block, args, kwargs, tensors)
            if self._split_fault and self._is_split:
                raise NotCompiled(self._split_fault)
        except NotCompiled as fault:
            noted.calls.setdefault(("arguments", block.group(self._variant())), fault.detail)
            return own(*args, **kwargs)
        if call_key in noted.calls or len(noted.calls) >= MAX_CALLS:
            return own(*args, **kwargs)
        if (known := self._calls.get(call_key)) is not None:
            noted.calls[call_key] = known
            return own(*args, **kwargs)
        if block.is_changed(self._variant()):  # what set them may set others in the next forward
            noted.calls[call_key] = "the attributes of a block are changed during a forward"
            return own(*args, **kwargs)
        state = Snapshot(map(vars, block.module.modules()))
        recorder = BlockRecorder(block.module, tensors, self._planned)
        try:
            with recorder.recording(self._functions):
                result = own(*args, **kwargs)
        except (XditdError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a class raises, and torch of operations that no mode may see
            if recorder.has_exchanged or "CUDA error" in str(error):
                raise
            noted.calls[call_key] = f"recording a block: {one_line(error)}"
            return own(*args, **kwargs)
        try:
            if not state.is_current():
                raise NotCompiled("a block changes its attributes")
            recording = recorder.finish(result)
        except NotCompiled as fault:
            noted.calls[call_key] = fault.detail
            return result
        name = digest_of(recording.encoded)
        new[name] = recording.encoded
        noted.calls[call_key] = CompiledCall(name, recording)
        return result

    def _run(self, block: BlockRun, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tensors: list[torch.Tensor] = []
        try:
            found = self._calls.get(self._call_key(block, args, kwargs, tensors))
        except NotCompiled:
            found = None
        if found is not None and not isinstance(found, str):
            made = self._graphs.find(found.name)
            if made is not None and made.function is not None:
                try:
                    result = block.run(found, made.function, tensors, self._planned, self._functions)
                except NotCompiled as fault:
                    self._graphs.refuse(found.name, fault.detail)
                    logger.warning("%s: %s", block.path, fault.detail)
                    if block.has_exchanged:
                        raise
                else:
                    if result is not None:
                        self.compiled += 1
                        return result.tree
        self.eager += 1
        return own(*args, **kwargs)


def find_compiled_blocks(
    module: torch.nn.Module,
    planned: PlannedModule | str | None,
    graphs: Callable[[], CompiledGraphs] | None,
    variant: Callable[[], Hashable] = lambda: None,
) -> CompiledBlocks | str:
    """Return the compiled blocks of a module, as :meth:`CompiledBlocks.of`, or the reason why it has none.

    ``graphs`` opens the folder of compiled graphs; ``None`` in a process that compiles nothing.
    """
    if graphs is None:
        return "this process compiles nothing"
    try:
        return CompiledBlocks.of(module, planned, graphs(), variant)
    except Unsupported as error:
        return error.detail
    except (OSError, RuntimeError) as error:  # no home folder, one that cannot be written to, a full disk
        return f"the folder of compiled graphs: {error}"
