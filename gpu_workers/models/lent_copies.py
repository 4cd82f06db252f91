"""A rank's own copies of lent bytes: which parts a lend of written memory changes, and which components share them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field

import torch

from xditd.gpu_workers.models.own_buffer import OwnBuffer
from xditd.ipc.tensors import Block, FileBlock, Manifest, TensorSpec
from xditd.ipc.transports.file_state import FileState


@dataclass
class LentCopies:
    """What a rank cannot view: tensors ``apart``, and whole blocks of other GPUs, by their numbers in the manifest.

    ``shared`` are tensors apart in the copies of another component, by their names here.
    """

    apart: OwnBuffer | None = None
    received: dict[int, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def buffers(self) -> list[torch.Tensor]:
        """All memory that they take, without what is shared."""
        return [*([] if self.apart is None else [self.apart.buffer]), *self.received.values()]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors apart, shared ones too."""
        return ({} if self.apart is None else self.apart.tensors) | self.shared

    def has_apart(self, specs: Collection[TensorSpec]) -> bool:
        """Return whether these are the tensors apart."""
        return self.tensors.keys() == {spec.name for spec in specs}


def find_shared(
    manifest: Manifest, apart: Iterable[TensorSpec], others: Iterable[tuple[Manifest, LentCopies]]
) -> dict[str, torch.Tensor]:
    """Return the tensors of ``apart`` that another component has copied from the same place of the same file, by name.

    A buffer of which less than half would be used is not shared: its memory would outlive the other component.
    """
    wanted = {place: spec for spec in apart if (place := _place(manifest.blocks, spec)) is not None}
    found: dict[str, torch.Tensor] = {}
    for manifest_of_other, copies in others if wanted else ():
        tensors = copies.tensors
        by_storage: dict[int, dict[str, torch.Tensor]] = {}
        for spec in manifest_of_other.tensors:
            here = wanted.get(_place(manifest_of_other.blocks, spec)) if spec.name in tensors else None
            if here is not None and here.name not in found:
                tensor = tensors[spec.name]
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), {})[here.name] = tensor
        for names in by_storage.values():
            whole = next(iter(names.values())).untyped_storage().nbytes()
            if 2 * sum(tensor.nbytes for tensor in names.values()) >= whole:
                found |= names
    return found


def _place(blocks: tuple[Block, ...], spec: TensorSpec) -> Hashable:
    """Return what is equal for equal bytes of one file; ``None`` for a tensor that is in no file."""
    block = blocks[spec.block]
    if not isinstance(block, FileBlock):
        return None
    return FileState.of_block(block), spec.offset_bytes, spec.dtype, spec.shape, spec.stride


def written_ranges(specs: Iterable[TensorSpec], written: Collection[str]) -> dict[int, list[range]]:
    """Return the bytes of the ``written`` tensors by number of block: ascending ranges, adjacent ones joined."""
    found: dict[int, list[range]] = {}
    for spec in sorted(specs, key=lambda spec: (spec.block, spec.offset_bytes)):
        if spec.name not in written or not spec.extent_bytes:
            continue
        ranges = found.setdefault(spec.block, [])
        start, stop = spec.offset_bytes, spec.offset_bytes + spec.extent_bytes
        if ranges and start <= ranges[-1].stop:
            ranges[-1] = range(ranges[-1].start, max(stop, ranges[-1].stop))
        else:
            ranges.append(range(start, stop))
    return found
