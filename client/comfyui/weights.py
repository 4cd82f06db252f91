"""Lend one component's weights while ComfyUI counts its model as loaded, merge patches into them, and use LoRAs.

| | unpatched tensors | patched tensors |
|---|---|---|
| whole | one arena on ComfyUI's GPU, filled once | written into the same arena |
| not whole | lent where they are, such as a file's mapped pages | an arena of their own |

Patches are merged between jobs. Only tensors whose patches changed are computed again; then they are lent as the next
generation, so that the workers read the new values, and copy these tensors alone again to their other GPUs. A packed
weight is written together with its companions. LoRAs that can be branches change no tensor: see ``lent_loras``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from xditd.client.arenas import Arena
from xditd.client.client import Client
from xditd.client.comfyui.lent_loras import LentLoras
from xditd.client.comfyui.packed_tensors import LendableTensors
from xditd.client.comfyui.source_files import SourceFiles
from xditd.client.loans import Loan, LoanWithLoras
from xditd.ipc.errors import OutOfMemory, RequestError, Unsupported, XditdError
from xditd.ipc.name_lists import listed
from xditd.ipc.recognition import form_error, unsupported_error
from xditd.ipc.tensor_names import bare_name, tells_nothing
from xditd.ipc.tensors import ComponentKind, ComputeDType
from xditd.ipc.transports.tensor_views import dtype_name, torch_dtype

if TYPE_CHECKING:
    import torch

    from xditd.client.comfyui.lora_patches import Factors

logger = logging.getLogger(__name__)

_UNFINISHED = (object(),)
"""Recipe of a tensor whose merge has not finished; it equals no edit's recipe."""


@dataclass(frozen=True)
class Edit:
    """A patched tensor: ``merge`` computes it from the unpatched one; equal ``recipe`` means equal result.

    For a packed weight ``merge`` takes the weight and its companions, and returns as many tensors.
    """

    recipe: tuple[Any, ...]
    merge: Callable[..., torch.Tensor | Sequence[torch.Tensor]]

    def merged(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Merge into a tensor and its companions."""
        found = self.merge(*tensors)
        return found if isinstance(found, Sequence) else [found]


class RemoteWeights:
    """One component's tensors and its loan. Not thread-safe, like ComfyUI's execution."""

    has_branches: bool = True
    """Whether the workers run LoRAs beside its layers; else they are merged into the weights."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | LendableTensors,
        *,
        kind: ComponentKind,
        label: str,
        device: str,
        is_whole: bool,
        connect: Callable[[], Client],
        compute_dtype: ComputeDType | None = None,
    ) -> None:
        """Keep ``tensors`` by their checkpoint names; ``device`` is where ComfyUI would load them.

        ``is_whole`` loads all of them into one arena there, else only patched ones. ``compute_dtype`` is that of packed
        weights.

        Raises:
            Unsupported: quantised tensors that are not described.
        """
        self.lendable = tensors if isinstance(tensors, LendableTensors) else LendableTensors(dict(tensors))
        check_plain(self.lendable.tensors, label, self.lendable)
        self.compute_dtype = compute_dtype
        self.kind = kind
        self.label = label
        self.connect = connect
        self._device = device
        self._is_whole = is_whole
        self._arena: Arena | None = None
        self._generation = 0
        self._merged: dict[str, tuple[Any, ...]] = {}
        self._loan: Loan | None = None
        self._loras = LentLoras(connect, kind, label)
        self._files = SourceFiles.behind(self.lendable.tensors.values())

    @property
    def base(self) -> dict[str, torch.Tensor]:
        """The unpatched tensors by name, with the companions of packed weights."""
        return self.lendable.tensors

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, companions of packed weights included."""
        return tuple(self.lendable.tensors)

    @property
    def shapes(self) -> dict[str, torch.Tensor]:
        """The tensors of the model on the meta device; packed weights in the compute dtype, without companions."""
        import torch

        return self.lendable.logical(torch.float32 if self.compute_dtype is None else torch_dtype(self.compute_dtype))

    @property
    def size_bytes(self) -> int:
        """The loan's bytes on ComfyUI's GPU; 0 if ComfyUI runs on the CPU."""
        if self._device == "cpu":
            return 0
        if not self._is_whole:
            return 0 if self._arena is None else self._arena.size_bytes
        return sum(tensor.numel() * tensor.element_size() for tensor in self.base.values())

    @property
    def loaded_bytes(self) -> int:
        return self.size_bytes if self._loan is not None else 0

    @property
    def loan(self) -> Loan:
        """The live loan; lends if there is none, as after a restart of the daemon."""
        if self._loan is None or not self._loan.is_live:
            return self._lend()
        return self._loan

    @property
    def in_use(self) -> Loan | LoanWithLoras:
        """The live loan with the LoRAs of the loaded MODEL, as jobs take it."""
        return self._loras.added_to(self.loan)

    def announce(self) -> None:
        """Have idle workers build the model, until the weights are lent. Nothing depends on it."""
        with contextlib.suppress(XditdError):
            self.connect().prepare(
                {**self.base, **self.lendable.markers},
                kind=self._given_kind,
                label=self.label,
                compute_dtype=self.compute_dtype,
            )

    @property
    def _given_kind(self) -> ComponentKind | None:
        """The workers recognise a module without a description by its tensors."""
        return None if self.kind is ComponentKind.MODULE else self.kind

    def use_loras(self, branches: Mapping[str, Sequence[Factors]], holder: object) -> None:
        """Use the LoRAs of ``holder``, a MODEL or CLIP, from now on; see :meth:`LentLoras.use`."""
        self._loras.use(self.loan, branches, holder)

    def use_hooked_loras(self, branches: Mapping[str, Sequence[Factors]], holder: object) -> None:
        """Use the LoRAs of hooks besides, until the next call; without any nothing is lent."""
        if branches:
            self._loras.use_hooked(self.loan, branches, holder)
        else:
            self._loras.drop_hooked()

    def apply(self, edits: Mapping[str, Edit]) -> Loan:
        """Lend the base tensors with ``edits`` merged; a no-op if they are lent like that.

        Raises:
            StaleSource: the weights' file was written since it was loaded.
        """
        if not (self._is_whole and self._arena is not None):
            self.check_files()
        stale = {name for name, edit in edits.items() if self._merged.get(name) != edit.recipe}
        gone = {name for name in self._merged if name not in edits}
        if not stale and not gone:
            return self.loan
        started = time.perf_counter()
        needs_arena = not self._is_whole and (self._arena is None or not edits.keys() <= self._arena.tensors.keys())
        changed: Collection[str] | None = None
        if self._is_whole:
            self._ensure_whole_arena()
            changed = self._write(stale, gone, edits)
        elif needs_arena or not edits:
            return self._lend_with_arena(edits)
        else:
            for name in gone:
                del self._merged[name]  # the base tensor is lent again
            changed = self._write(stale, set(), edits)
        self._log_patched(len(stale), len(gone), len(edits), started)
        return self._lend(changed)

    def check_files(self) -> None:
        """Check the files before their tensors are read in this process.

        Raises:
            StaleSource: one was written over since a loader read it.
        """
        self._files.check()

    def release(self) -> None:
        """Return the loan and its LoRAs, and free its arena. The next use lends again."""
        self._loras.release()
        loan, self._loan = self._loan, None
        arena, self._arena = self._arena, None
        self._merged.clear()
        self._generation = 0
        try:
            if loan is not None:
                loan.return_()
        except XditdError as error:
            logger.warning("loan not returned label=%s reason=%s", self.label, error)
        finally:
            _close(arena, self.label)

    def _write(self, stale: set[str], gone: set[str], edits: Mapping[str, Edit]) -> Collection[str]:
        """Merge ``stale`` tensors, restore those that are ``gone``, and return the names of all that were written."""
        assert self._arena is not None
        self.check_files()
        names = sorted(stale | gone)
        # If a merge fails half way, the next apply has to write these tensors again, whatever its edits.
        self._merged.update(dict.fromkeys(names, _UNFINISHED))
        owners = {each: name for name in names for each in self.lendable.group(name)}
        missing = {name: len(self.lendable.group(name)) for name in names}
        for each in self._arena.fill({each: self.base[each] for each in owners}):
            name = owners[each]
            missing[name] -= 1
            if missing[name]:
                continue  # a companion is still being copied
            if name in stale:
                targets = [self._arena.tensors[part] for part in self.lendable.group(name)]
                for target, merged in zip(targets, edits[name].merged(targets), strict=True):
                    target.copy_(merged)
                self._merged[name] = edits[name].recipe
            else:
                del self._merged[name]
        self._generation += 1
        return tuple(owners)

    def _ensure_whole_arena(self) -> Arena:
        if self._arena is None:
            self.check_files()
            self._arena = Arena.copy_of(self.base, self._device)
            logger.info(
                "weights loaded label=%s device=%s bytes=%d load_ms=%.1f",
                self.label, self._device, self._arena.size_bytes, self._arena.fill_ms,
            )  # fmt: skip
        return self._arena

    def _lend_with_arena(self, edits: Mapping[str, Edit]) -> Loan:
        """Lend with these tensors patched, in an arena of their own; then return the older loan, and free its arena.

        Workers share what they have copied of a file with the older component. If there is no memory for both, the
        older one goes first.
        """
        loan, arena = self._loan, self._arena
        self._loan = self._arena = None
        try:
            try:
                return self._lend_patched(edits)
            except OutOfMemory:
                self._end(loan, arena)
                loan = arena = None
                return self._lend_patched(edits)
        finally:
            self._end(loan, arena)

    def _lend_patched(self, edits: Mapping[str, Edit]) -> Loan:
        started = time.perf_counter()
        _close(self._arena, self.label)
        self._arena = None
        self._merged.clear()
        self._generation = 0
        if edits:
            names = [each for name in edits for each in self.lendable.group(name)]
            self._arena = Arena(
                {name: (self.base[name].dtype, tuple(self.base[name].shape)) for name in names}, self._device
            )
            self._write(set(edits), set(), edits)
        self._log_patched(len(edits), 0, len(edits), started)
        return self._lend()

    def _end(self, loan: Loan | None, arena: Arena | None) -> None:
        if loan is not None and loan.is_live:
            loan.return_()
        _close(arena, self.label)

    def _log_patched(self, changed: int, restored: int, patched: int, started: float) -> None:
        logger.info(
            "weights patched label=%s changed=%d restored=%d patched=%d merge_ms=%.1f",
            self.label, changed, restored, patched, (time.perf_counter() - started) * 1e3,
        )  # fmt: skip

    def _lend(self, changed: Collection[str] | None = None) -> Loan:
        """Lend the tensors. ``changed`` are those that were written since the generation before.

        Raises:
            StaleSource: a tensor is in a file that was written over since a loader read it.
        """
        if not self._is_whole:
            self.check_files()
        if self._is_whole:
            tensors: Mapping[str, torch.Tensor] = self._ensure_whole_arena().tensors
        elif self._arena is not None:
            patched = [each for name in self._merged for each in self.lendable.group(name)]
            tensors = {**self.base, **{name: self._arena.tensors[name] for name in patched}}
        else:
            tensors = self.base
        older = self._loan
        self._loan = self.connect().lend(
            {**tensors, **self.lendable.markers},
            kind=self._given_kind,
            label=self.label,
            generation=self._generation,
            changed=changed,
            compute_dtype=self.compute_dtype,
        )
        if older is not None and older.is_live:
            older.return_()
        return self._loan


def check_plain(tensors: Mapping[str, torch.Tensor], label: str, lendable: LendableTensors | None = None) -> None:
    """Refuse quantised tensors, but those that ``lendable`` describes.

    Raises:
        Unsupported: fp8 or another packed dtype, or GGUF.
    """
    import torch

    plain = (torch.bfloat16, torch.float16, torch.float32)
    known = set() if lendable is None else {each for name in lendable.packed for each in lendable.group(name)}
    packed = []
    for name, tensor in tensors.items():
        if name in known or tells_nothing(bare_name(name)):
            continue
        kind = type(tensor).__name__
        if "gg" in kind.lower():
            raise Unsupported(f"{label}: {name} is a GGUF tensor; GGUF is not supported, use a bf16 or fp16 file")
        if tensor.dtype not in plain or kind == "QuantizedTensor":
            packed.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}")
    if packed:
        _refuse(form_error(_tensor_info(tensors)), label)
        raise Unsupported(
            f"{label}: fp8 and other quantised weights are not supported, use a bf16 or fp16 file; "
            f"{len(packed)} of {len(tensors)} tensors: {listed(packed)}",
            names=packed,
        )


def refuse_known(tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """Name a file that the caller does not support, if its kind is known; else return.

    Raises:
        Unsupported: a LoRA, an all-in-one checkpoint, another model, or packed weights.
    """
    _refuse(unsupported_error(_tensor_info(tensors)), label)


def _refuse(known: RequestError | None, label: str) -> None:
    if known is not None:
        raise Unsupported(f"{label}: {known.detail}", names=known.names)


def _tensor_info(tensors: Mapping[str, torch.Tensor]) -> dict[str, _TensorInfo]:
    return {name: _TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


class _TensorInfo(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def _close(arena: Arena | None, label: str) -> None:
    if arena is None:
        return
    try:
        arena.close()
    except XditdError as error:
        logger.warning("arena not freed label=%s reason=%s", label, error)
