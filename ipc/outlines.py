"""Outlines: a component without its bytes, announced before it is lent, so that workers build its model meanwhile."""

from __future__ import annotations

from typing import Annotated

import msgspec

from xditd.ipc import limits
from xditd.ipc.field_types import Described, DType, Name, Shape
from xditd.ipc.packed import PackedWeight, packed_faults
from xditd.ipc.tensors import ComponentKind, ComputeDType, ModuleDescription


class OutlinedTensor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor without its bytes."""

    name: Name
    dtype: DType
    shape: Shape


class Outline(Described, frozen=True, kw_only=True):
    """What a :class:`~xditd.ipc.tensors.Manifest` says of its component, but for where the bytes are.

    A ``module`` may be given without tensors: then they are those that its class makes, in the ``compute_dtype``.
    """

    kind: ComponentKind | None = None
    module: ModuleDescription | None = None
    label: Name
    tensors: Annotated[tuple[OutlinedTensor, ...], msgspec.Meta(max_length=limits.MAX_TENSORS)] = ()
    packed: Annotated[tuple[PackedWeight, ...], msgspec.Meta(max_length=limits.MAX_TENSORS)] = ()
    compute_dtype: ComputeDType | None = None

    def faults(self) -> list[str]:
        """List the inconsistencies of the outline, as sentences; empty if it is valid."""
        if not self.tensors and self.module is None:
            return ["it has neither tensors nor a class"]
        tensors = {each.name: each for each in self.tensors}
        found = [] if len(tensors) == len(self.tensors) else ["a tensor is listed twice"]
        if self.kind in (ComponentKind.LORA, ComponentKind.TOKENIZER):
            found.append(f"no model is built for the kind {self.kind.value}")
        return found + (packed_faults(self.packed, tensors) if self.packed else [])
