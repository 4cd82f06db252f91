"""The tensors of a file, as its header describes them, whatever the format of the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.field_types import DType
from xditd.ipc.packed import PackedWeight
from xditd.ipc.transports.tensor_views import align


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in the file; ``offset_bytes`` counts from the file's start."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """The header of a file: its first ``length_bytes``, in a safetensors file with the 8 bytes of the length itself."""

    length_bytes: int
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the writer of the file says of it."""
    packed: tuple[PackedWeight, ...] = ()
    """The packed weights of a GGUF file, whose header has their types. In a safetensors file, names tell them."""


def check_coverage(
    tensors: Iterable[StoredTensor], path: str, *, data_start: int, file_bytes: int, alignment: int = 1
) -> None:
    """Check that each byte of data belongs to one tensor, but for what pads tensors to the alignment.

    Raises:
        BadCheckpoint: tensors overlap, leave gaps, or end before or after the file does.
    """
    end, last = data_start, None
    for stored in sorted(tensors, key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes)):
        expected = align(end, alignment)
        if stored.offset_bytes != expected:
            how = "overlaps the tensor before it" if stored.offset_bytes < expected else "leaves a gap before it"
            raise BadCheckpoint(f"{path}: tensor {stored.name!r:.200} starts at byte {stored.offset_bytes} and {how}")
        end, last = expected + stored.size_bytes, stored
    if last is not None and end > file_bytes:
        raise BadCheckpoint(
            f"{path}: tensor {last.name!r:.200} ends at byte {end} of {file_bytes}; the file is truncated: get it again"
        )
    if file_bytes >= end + alignment:
        raise BadCheckpoint(f"{path}: tensors end at byte {end} of {file_bytes}; bytes follow the last tensor")
