"""Descriptions of lent bytes: blocks (where bytes are) and tensors (names, dtypes and shapes in a block).

A message describes a component by a :class:`Manifest` and never carries the bytes: a block names a device allocation, a
sealed shared-memory segment or a file, which each worker opens. Descriptor numbers are those of the exporting process,
which the daemon takes from the socket's peer credentials, never from a message.
"""

from __future__ import annotations

import math
from enum import Enum
from itertools import pairwise
from typing import Annotated, Literal

import msgspec

from xditd.ipc import limits
from xditd.ipc.field_types import ITEM_BYTES, Bytes, Count, Described, DType, Name, Shape
from xditd.ipc.loras import LoraDescription, lora_faults
from xditd.ipc.packed import PackedFormat, PackedWeight, packed_faults
from xditd.ipc.tokenizer_files import file_fault

Inode = Annotated[int, msgspec.Meta(ge=0)]
"""All 64 bits, as MessagePack allows: overlay file systems put a layer's number into the highest ones."""
Nanoseconds = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Since 1970; may be negative for files."""
Digest = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
"""BLAKE2b-128."""
Descriptor = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class ComponentKind(Enum):
    """The kind of a component; a job names one component of each kind that it needs."""

    TRANSFORMER = "transformer"
    VAE = "vae"
    TEXT_ENCODER = "text_encoder"
    CONTROLNET = "controlnet"
    """A model whose residuals are added to those of a transformer."""
    MODULE = "module"
    """A module of diffusers or transformers, run as its own class does."""
    LORA = "lora"
    """Low-rank differences of other components' weights: jobs name it beside the component that it changes."""
    TOKENIZER = "tokenizer"
    """The files of a tokenizer or a processor of transformers, each a tensor of bytes."""


class Tier(Enum):
    """How a block's bytes reach the workers."""

    CUDA_IPC = "cuda_ipc"
    HOST_SHM = "host_shm"
    FILE = "file"


class Fingerprint(Described, frozen=True, kw_only=True):
    """A hash of part of a block, with which a worker checks that it mapped the right bytes.

    ``digest`` is BLAKE2b-128 of ``length_bytes`` from ``offset_bytes`` of the block: the header of a
    file, or up to 4 KiB of the first lent tensor.
    """

    offset_bytes: Bytes = 0
    length_bytes: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_SAFETENSORS_HEADER_BYTES + 8)]
    digest: Digest


class CudaIpcBlock(Described, frozen=True, kw_only=True, tag_field="tier", tag="cuda_ipc"):
    """One device allocation of the exporter, by its 64-byte CUDA IPC handle.

    The handle covers the whole allocation; ``size_bytes`` counts from its base address.
    """

    device_uuid: Name
    handle: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
    size_bytes: Bytes
    fingerprint: Fingerprint


class HostShmBlock(Described, frozen=True, kw_only=True, tag_field="tier", tag="host_shm"):
    """A memfd of the exporter, sealed against shrinking, which would cause SIGBUS in readers."""

    fd: Descriptor
    inode: Inode
    size_bytes: Bytes
    fingerprint: Fingerprint


class FileBlock(Described, frozen=True, kw_only=True, tag_field="tier", tag="file"):
    """A whole safetensors or GGUF file that the exporter holds open for reading; ``path`` is for people.

    A writer can set ``mtime_ns`` back, but not ``ctime_ns``.
    """

    fd: Descriptor
    path: Annotated[str, msgspec.Meta(max_length=4096)]
    device: Count
    inode: Inode
    mtime_ns: Nanoseconds
    ctime_ns: Nanoseconds
    size_bytes: Bytes
    fingerprint: Fingerprint


class FileDigest(Described, frozen=True, kw_only=True):
    """The digest of all bytes of a lent file, at the time of its ctime ``ctime_ns``."""

    block: Annotated[int, msgspec.Meta(ge=0, lt=limits.MAX_BLOCKS)]
    """Its number in the manifest."""
    ctime_ns: Nanoseconds
    digest: Digest


Block = CudaIpcBlock | HostShmBlock | FileBlock


def tier_of(block: Block) -> Tier:
    if isinstance(block, CudaIpcBlock):
        return Tier.CUDA_IPC
    return Tier.HOST_SHM if isinstance(block, HostShmBlock) else Tier.FILE


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor: bytes from ``offset_bytes`` of block number ``block``.

    ``stride`` counts elements; ``None`` is contiguous.
    """

    name: Name
    dtype: DType
    shape: Shape
    block: Annotated[int, msgspec.Meta(ge=0, lt=limits.MAX_BLOCKS)]
    offset_bytes: Bytes
    stride: Shape | None = None

    @property
    def span(self) -> int:
        """The product of all sides that are not 0: the largest number that occurs when elements are counted."""
        return math.prod(side or 1 for side in self.shape)

    @property
    def extent_bytes(self) -> int:
        """Bytes from the first element to the end of the last one."""
        item = ITEM_BYTES[self.dtype]
        if 0 in self.shape:
            return 0
        if self.stride is None:
            return math.prod(self.shape) * item
        return (sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=False)) + 1) * item


Acceleration = Literal["auto", "eager", "compiled", "captured"]
"""How forwards of a module run: its class's code kernel by kernel, with compiled blocks, captured as a CUDA graph with
the bits of the eager forward, or (``auto``) both where they gain."""


class ModuleDescription(Described, frozen=True, kw_only=True):
    """A module to be run as its own class does.

    ``class_name`` is ``package.Class``, such as ``diffusers.FluxTransformer2DModel``; ``config`` is the JSON of its
    configuration. ``state`` is the compressed JSON of a :class:`~xditd.ipc.module_state.ModuleState`, the attributes of
    all submodules; without it the module is as the class makes it.
    """

    class_name: Name
    config: Annotated[str, msgspec.Meta(max_length=limits.MAX_TEXT_CHARS)]
    state: Annotated[bytes, msgspec.Meta(max_length=limits.MAX_MODULE_STATE_BYTES)] = b""
    allows_family: bool = False
    """Whether a family may run it, if it is as its class makes it."""
    acceleration: Acceleration | None = None
    """How its forwards run on GPUs; ``None``: as the daemon's setting says."""


ComputeDType = Literal["bfloat16", "float16", "float32"]
TensorNames = Annotated[tuple[Name, ...], msgspec.Meta(max_length=limits.MAX_TENSORS)]


class Manifest(Described, frozen=True, kw_only=True):
    """A component: its blocks, its tensors, and how often its content was rewritten in place (``generation``).

    Without a ``kind`` the workers find it from the tensors; with one, tensors of another kind are refused. With a
    ``module``, the tensors have the names of that module's parameters, buffers and attributes, and a family is asked if
    the module allows it; with both, the family has to compute as the module's configuration says.

    ``packed`` says which tensors are packed weights and their companions; all others are plain. ``compute_dtype`` is
    the dtype into which packed weights are dequantised; without it, that of most plain weights. With a ``lora``, the
    tensors are its factors, and no family is asked. With the kind ``tokenizer``, they are the bytes of its files, by
    their names.
    """

    kind: ComponentKind | None = None
    module: ModuleDescription | None = None
    label: Name
    blocks: Annotated[tuple[Block, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_BLOCKS)]
    tensors: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=limits.MAX_TENSORS)]
    packed: Annotated[tuple[PackedWeight, ...], msgspec.Meta(max_length=limits.MAX_TENSORS)] = ()
    compute_dtype: ComputeDType | None = None
    lora: LoraDescription | None = None
    generation: Count = 0

    @property
    def tensor_bytes(self) -> int:
        return sum(spec.extent_bytes for spec in self.tensors)

    @property
    def bytes_by_dtype(self) -> dict[DType, int]:
        """Bytes of tensors of each dtype."""
        found: dict[DType, int] = {}
        for spec in self.tensors:
            found[spec.dtype] = found.get(spec.dtype, 0) + spec.extent_bytes
        return found

    @property
    def bytes_by_format(self) -> dict[PackedFormat, int]:
        """Bytes of packed weights with their companions, by format."""
        sizes = {spec.name: spec.extent_bytes for spec in self.tensors}
        found: dict[PackedFormat, int] = {}
        for each in self.packed:
            found[each.format] = found.get(each.format, 0) + sum(sizes[name] for name in each.names)
        return found

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes of tensors in blocks of each tier, by the tier's name."""
        found: dict[str, int] = {}
        for spec in self.tensors:
            tier = tier_of(self.blocks[spec.block]).value
            found[tier] = found.get(tier, 0) + spec.extent_bytes
        return found

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers of its blocks, each once."""
        return tuple(sorted({tier_of(block) for block in self.blocks}, key=lambda tier: tier.value))

    def faults(self) -> list[str]:
        """List the inconsistencies of the description, as sentences; empty if it is valid."""
        found: list[str] = []
        seen: set[str] = set()
        for spec in self.tensors:
            if spec.name in seen:
                found.append(f"tensor {spec.name} is listed twice")
            seen.add(spec.name)
            if spec.block >= len(self.blocks):
                found.append(f"tensor {spec.name} is in block {spec.block} of {len(self.blocks)}")
                continue
            if spec.stride is not None and len(spec.stride) != len(spec.shape):
                found.append(f"tensor {spec.name} has {len(spec.shape)} dimensions but {len(spec.stride)} strides")
                continue
            if spec.span > limits.MAX_BYTES:  # even if zeros in shape or stride make it fit: torch counts in 64 bits
                found.append(f"tensor {spec.name} has the shape {list(spec.shape)}, which is too large for any memory")
                continue
            end = spec.offset_bytes + spec.extent_bytes
            size = self.blocks[spec.block].size_bytes
            if end > size:
                found.append(f"tensor {spec.name} ends at byte {end} of block {spec.block}, which has {size}")
        if self.packed:
            found += self._packed_faults()
        if self.kind is ComponentKind.TOKENIZER:
            found += self._tokenizer_faults()
        return found + self._lora_faults()

    def _tokenizer_faults(self) -> list[str]:
        found = [fault for spec in self.tensors if (fault := file_fault(spec.name, spec.extent_bytes))]
        found += [
            f"{spec.name} is {spec.dtype} of {len(spec.shape)} dimensions: the bytes of a file are uint8, in one"
            for spec in self.tensors
            if spec.dtype != "uint8" or len(spec.shape) != 1 or spec.stride is not None
        ]
        if self.tensor_bytes > limits.MAX_TOKENIZER_BYTES:
            found.append(f"its files have {self.tensor_bytes} bytes: at most {limits.MAX_TOKENIZER_BYTES} are read")
        if any(isinstance(block, CudaIpcBlock) for block in self.blocks):
            found.append("files of a tokenizer are in device memory: lend the folder by its path")
        if self.module is not None or self.packed or self.lora is not None:
            found.append("a tokenizer has no class of a module, no packed weights and no LoRA")
        return found

    def _lora_faults(self) -> list[str]:
        if (self.lora is None) != (self.kind is not ComponentKind.LORA):
            return ["the kind lora and the description of a LoRA come together"]
        if self.lora is None:
            return []
        used = {name for layer in self.lora.layers for name in (layer.down, layer.up)}
        others = [f"tensor {spec.name} is of no layer of the LoRA" for spec in self.tensors if spec.name not in used]
        return lora_faults(self.lora.layers, {spec.name: spec for spec in self.tensors}) + others

    def _packed_faults(self) -> list[str]:
        specs = {spec.name: spec for spec in self.tensors}
        found = packed_faults(self.packed, specs)
        for packed in self.packed:
            parts = [specs[name] for name in packed.names if name in specs]
            if packed.format != "float8":
                found += [
                    f"tensor {part.name}, of a weight packed as {packed.format}, has the strides {list(part.stride)}: "
                    "its bytes are read in order, so lend its contiguous()"
                    for part in parts
                    if part.stride is not None
                ]
            parts.sort(key=lambda part: (part.block, part.offset_bytes))
            found += [
                f"tensor {after.name} begins inside the bytes of {before.name}: lend a clone() of it"
                for before, after in pairwise(parts)
                if before.block == after.block and after.offset_bytes < before.offset_bytes + before.extent_bytes
            ]
        return found


class CopiedBytes(Described, frozen=True, kw_only=True):
    """Bytes that were copied to serve a request, by kind; all zero if memory is shared. Sums are capped."""

    host_to_host: Bytes = 0
    host_to_device: Bytes = 0
    device_to_device: Bytes = 0
    peer: Bytes = 0

    def __add__(self, other: CopiedBytes) -> CopiedBytes:
        return CopiedBytes(
            host_to_host=min(self.host_to_host + other.host_to_host, limits.MAX_BYTES),
            host_to_device=min(self.host_to_device + other.host_to_device, limits.MAX_BYTES),
            device_to_device=min(self.device_to_device + other.device_to_device, limits.MAX_BYTES),
            peer=min(self.peer + other.peer, limits.MAX_BYTES),
        )

    @property
    def total(self) -> int:
        return self.host_to_host + self.host_to_device + self.device_to_device + self.peer


class IoTensor(Described, frozen=True, kw_only=True):
    """A contiguous tensor in the I/O block of a job."""

    offset_bytes: Bytes
    dtype: DType
    shape: Shape

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]
