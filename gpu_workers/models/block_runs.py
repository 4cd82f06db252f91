"""Run one block by a compiled graph: with its tensors of now, and with the attentions of the forward that runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from xditd.gpu_workers.models.attention_operator import attention_by
from xditd.gpu_workers.models.block_arguments import fill_places
from xditd.gpu_workers.models.block_attention import AttentionCall, AttentionFunctions
from xditd.gpu_workers.models.block_compiler import one_line
from xditd.gpu_workers.models.block_graphs import NotCompiled, TensorKind
from xditd.gpu_workers.models.block_recordings import Recording, holder
from xditd.gpu_workers.models.forward_state import Site
from xditd.gpu_workers.models.packed_operator import products_by
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.repeated_blocks import attributes_key, state_key
from xditd.ipc.errors import XditdError

_MAX_STATES: Final = 64
"""The most recordings for which a block's own tensors are remembered."""
_ALIGNMENT: Final = 16
"""Compiled kernels for GPUs expect tensors to start at multiples of so many bytes."""


@dataclass(frozen=True, slots=True)
class CompiledCall:
    """What a call of a block computes, and the name of its graph."""

    name: str
    recording: Recording


class BlockResult(NamedTuple):
    """What a block returned, which may be ``None``."""

    tree: Any


class BlockRun:
    """A repeated block."""

    def __init__(self, path: str, module: torch.nn.Module) -> None:
        self.path = path
        self.module = module
        self._variants: dict[Hashable, tuple[int, Hashable]] = {}
        """Its group and its attributes in each variant."""
        self.has_exchanged = False
        """Whether the last run has begun an attention whose tokens are split over ranks."""
        self._states: dict[Recording, _BlockState] = {}
        """The block's own tensors by recording, and not by graph: calls of one graph may take different ones."""

    def note(self, variant: Hashable, groups: dict[Hashable, int]) -> None:
        """Note a new variant, for which the module is set now; its group is that of ``groups`` for its state."""
        if variant not in self._variants:
            group = groups.setdefault(state_key(self.module), len(groups))
            self._variants[variant] = group, attributes_key(self.module)

    def group(self, variant: Hashable) -> int | None:
        """Return the group in a variant: blocks of one compute the same operations with the same arguments.

        ``None`` if the variant was not noted.
        """
        found = self._variants.get(variant)
        return None if found is None else found[0]

    def is_changed(self, variant: Hashable) -> bool:
        """Return whether the module has other attributes than it had when the variant was noted."""
        found = self._variants.get(variant)
        return found is None or attributes_key(self.module) != found[1]

    def run(
        self,
        call: CompiledCall,
        function: Callable[..., Sequence[torch.Tensor]],
        arguments: Sequence[torch.Tensor],
        planned: PlannedModule | None,
        functions: AttentionFunctions,
    ) -> BlockResult | None:
        """Return what the block returns for these tensors; ``None`` if its own tensors are not those of the graph.

        Raises:
            NotCompiled: the compiled graph failed.
            XditdError, torch.OutOfMemoryError: as the block itself.
        """
        recording = call.recording
        self.has_exchanged = False
        state = self._states.get(recording)
        if state is None:
            if len(self._states) >= _MAX_STATES:
                self._states.clear()
            state = self._states[recording] = _BlockState(self.module, recording)
        own = state.tensors()
        if own is None:
            return None
        attending = _Attending(self, recording.attentions, planned, functions)
        multiplying = _Multiplying(self.module, recording.packed)
        try:
            with attention_by(attending), products_by(multiplying):
                results = function(*[arguments[number] for number in recording.arguments], *own)
        except (XditdError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever compiled code raises
            if attending.has_failed or multiplying.has_failed or "CUDA error" in str(error):
                raise
            raise NotCompiled(f"a compiled block failed: {one_line(error)}") from error
        return BlockResult(fill_places(recording.results, arguments, results))


class _BlockState:
    """The block's own tensors among the inputs of a graph: whatever they are when it runs, if they are alike."""

    def __init__(self, block: torch.nn.Module, recording: Recording) -> None:
        kinds = recording.kinds[len(recording.arguments) :]
        self._held: list[tuple[Mapping[str, torch.Tensor], str, TensorKind]] = [
            (holder(block, name), name.name, kind) for name, kind in zip(recording.state, kinds, strict=True)
        ]
        self._known: list[Callable[[], torch.Tensor | None]] = []
        """Weak references to the tensors that were found to be alike: lent memory is not held."""

    def tensors(self) -> list[torch.Tensor] | None:
        found = [held.get(name) for held, name, _ in self._held]
        if len(self._known) != len(found) or any(
            known() is not each for known, each in zip(self._known, found, strict=True)
        ):
            self._known = []
            for each, (_, _, kind) in zip(found, self._held, strict=True):
                if each is None or TensorKind.of(each) != kind or not _is_aligned(each):
                    return None
            self._known = [weakref.ref(each) for each in found if each is not None]
        return [each for each in found if each is not None]


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" or tensor.data_ptr() % _ALIGNMENT == 0


class _Multiplying:
    """Computes the packed layers of one run of a block, given by their paths."""

    def __init__(self, block: torch.nn.Module, paths: Sequence[str]) -> None:
        self.has_failed = False
        self._block = block
        self._paths = paths

    def __call__(self, number: int, x: torch.Tensor) -> torch.Tensor:
        try:
            found: torch.Tensor = self._block.get_submodule(self._paths[number])(x)
        except BaseException:
            self.has_failed = True
            raise
        return found


class _Attending:
    """Computes the attentions of one run of a block, each as at its place in an eager forward."""

    def __init__(
        self,
        block: BlockRun,
        calls: Sequence[AttentionCall],
        planned: PlannedModule | None,
        functions: AttentionFunctions,
    ) -> None:
        self.has_failed = False
        self._block = block
        self._calls = calls
        self._planned = planned
        self._functions = functions
        self._sites: dict[str, Site] = {}

    def __call__(
        self,
        number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        call = self._calls[number]
        try:
            if call.site is None or self._planned is None or self._planned.current is None:
                return self._functions.compute(call, query, key, value, mask)
            site = self._sites.get(call.site)
            if site is None:
                site = self._sites[call.site] = self._planned.site(self._block.module.get_submodule(call.site))
            self._block.has_exchanged = True
            sites = self._planned.current.sites
            sites.append(site)
            try:
                return self._functions.compute(call, query, key, value, mask)
            finally:
                sites.pop()
        except BaseException:
            self.has_failed = True
            raise
