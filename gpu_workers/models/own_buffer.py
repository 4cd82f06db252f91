"""A rank's own copy of lent tensors: those that it cannot map, or that it keeps when their loan ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch

from xditd.gpu_workers.models.file_watch import check_files_unchanged
from xditd.gpu_workers.parallel.upload_partition import CopyRange, clip_ranges, join_ranges
from xditd.gpu_workers.weights.blocks import OpenBlock
from xditd.ipc.tensors import TensorSpec
from xditd.ipc.transports.file import FileMapping
from xditd.ipc.transports.tensor_views import BlockViews, place
from xditd.ipc.transports.upload_pieces import FileStretch
from xditd.ipc.transports.uploads import can_upload, upload


@dataclass(frozen=True)
class OwnBuffer:
    """A buffer of this rank with copies of tensors, and which bytes of the lent blocks fill it."""

    buffer: torch.Tensor
    ranges: list[CopyRange]
    _specs: list[TensorSpec]
    _offsets: list[int]

    @staticmethod
    def allocate(specs: list[TensorSpec], device: torch.device) -> OwnBuffer | None:
        """Allocate a buffer for these tensors, each aligned; ``None`` if there are none."""
        if not specs:
            return None
        specs = _in_order(specs)
        offsets, total = place([spec.extent_bytes for spec in specs])
        buffer = torch.empty(total, dtype=torch.uint8, device=device)
        return OwnBuffer(buffer, join_ranges(specs, offsets), specs, offsets)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, which view the buffer: those of a large model take milliseconds."""
        views = BlockViews(self.buffer)
        return {spec.name: views.view(spec, at) for spec, at in zip(self._specs, self._offsets, strict=True)}

    def ranges_of(self, specs: list[TensorSpec], names: Collection[str]) -> list[CopyRange]:
        """Return the ranges of ``names`` alone; ``specs`` are those of all its tensors, maybe in blocks lent anew."""
        specs = _in_order(specs)
        offsets, _ = place([spec.extent_bytes for spec in specs])
        chosen = [(spec, at) for spec, at in zip(specs, offsets, strict=True) if spec.name in names]
        return join_ranges([spec for spec, _ in chosen], [at for _, at in chosen])

    def fill(
        self,
        sources: Sequence[torch.Tensor],
        opened: Sequence[OpenBlock | None],
        parts: Sequence[range],
        ranges: Sequence[CopyRange] | None = None,
    ) -> Generator[None, None, None]:
        """Fill ``parts`` of the buffer from ``sources``, those of each block, and yield after each, in stream order.

        With ``ranges`` only these bytes are copied.

        Files among ``opened`` are read by ``pread``, not through their mappings, and checked for changes at the end.
        """
        uploads: list[tuple[torch.Tensor | FileStretch, torch.Tensor]] = []
        counts = []
        for part in parts:
            before = len(uploads)
            for number, start, to, size in clip_ranges(self.ranges if ranges is None else ranges, part):
                target, block = self.buffer.narrow(0, to, size), opened[number]
                if target.is_cuda and block is not None and isinstance(block.mapping, FileMapping):
                    uploads.append((block.mapping.stretch(start, size), target))
                    continue
                source = sources[number].narrow(0, start, size)
                if can_upload(source, target):
                    uploads.append((source, target))
                else:
                    target.copy_(source)
            counts.append(len(uploads) - before)
        with upload(uploads) as copied:
            _ = self.tensors  # made while threads copy
            for count in counts:
                deque(islice(copied, count), maxlen=0)
                yield
        check_files_unchanged(opened)  # all reads are done


def _in_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda spec: (spec.block, spec.offset_bytes))
