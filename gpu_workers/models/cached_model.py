"""A model of a family without weights, to which lent tensors are assigned as parameters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch

from xditd.gpu_workers.kernels.branches import Branch, Branches
from xditd.gpu_workers.models.entries import Bindings
from xditd.gpu_workers.models.family import Family, Kind
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.operations import (
    BranchMemory,
    ControlNetOperations,
    Operations,
    TextEncoderOperations,
    TransformerOperations,
    VaeOperations,
)
from xditd.gpu_workers.models.process_resources import ProcessResources
from xditd.gpu_workers.packed.embedding import PackedEmbedding
from xditd.gpu_workers.packed.linear import PackedLinear, PackedMemory, add_branches_to, largest_bytes
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import Internal
from xditd.ipc.name_lists import listed
from xditd.ipc.status import FusedCheck

if TYPE_CHECKING:
    from xditd.gpu_workers.models.planned_path import PlannedPath


class CachedModel:
    """One model. ``owner`` is the component id of the plugged weights, or ``None``.

    ``layout`` is the group's, with the degrees that its heads allow and an attention backend for its dtype.
    ``packed_layers`` are the layers that multiply packed weights or look up their rows, by the names of these.
    ``branches`` are the LoRAs' places, by the names of linear layers.
    """

    def __init__(
        self,
        family: Family[Any],
        operations: Operations[Any],
        config: Hashable,
        dtype: torch.dtype,
        layout: ParallelLayout,
        module: torch.nn.Module,
        exceptions: Mapping[str, torch.dtype],
        packed_layers: Mapping[str, PackedLinear | PackedEmbedding],
        packed_memory: PackedMemory,
        resources: ProcessResources | None = None,
    ) -> None:
        self.family = family
        self.config = config
        self.dtype = dtype
        self.layout = layout
        self.device = layout.device
        self.module = module
        self.owner: str | None = None
        self.had_weights = False
        """Whether weights were plugged so far, those of a warm-up included."""
        self.operations = operations
        self.packed_layers = packed_layers
        self.scratch_bytes = largest_bytes(packed_layers.values())
        self.packed_memory = packed_memory
        self.branches = add_branches_to(module)
        self._exceptions = exceptions
        self._fast = operations.fuse(config, module, layout, dtype, exceptions)
        if resources is not None and hasattr(self._fast, "resources"):
            cast(Any, self._fast).resources = resources
        # The dictionary and key of each parameter.
        self._slots: dict[str, tuple[dict[str, torch.nn.Parameter | None], str]] = {}
        self._empty: dict[str, torch.nn.Parameter] = {}
        for path, submodule in module.named_modules():
            for name, parameter in submodule._parameters.items():
                if parameter is not None:
                    target = f"{path}.{name}" if path else name
                    self._slots[target] = (submodule._parameters, name)
                    self._empty[target] = parameter

    @overload
    def operations_for(self, kind: Literal["transformer"]) -> TransformerOperations[Any]: ...
    @overload
    def operations_for(self, kind: Literal["vae"]) -> VaeOperations[Any]: ...
    @overload
    def operations_for(self, kind: Literal["text_encoder"]) -> TextEncoderOperations[Any]: ...
    @overload
    def operations_for(self, kind: Literal["controlnet"]) -> ControlNetOperations[Any]: ...
    def operations_for(self, kind: Kind) -> Any:
        """Return the family's operations, typed by kind; ``registry.operations_of`` has checked them."""
        assert self.family.kind == kind, f"{self.family.name} is a {self.family.kind}, not a {kind}"
        return self.operations

    @property
    def title(self) -> str:
        """The family's name, for messages."""
        return self.family.name

    def branch_dtype(self, layer: str) -> torch.dtype:
        """Return the dtype in which LoRAs' branches beside a layer compute: that of its weight, if it is wider."""
        if self.family.kind == "text_encoder":
            return torch.float32
        target = f"{layer}.weight"
        packed = self.packed_layers.get(target)
        own = self._exceptions.get(target, self.dtype) if packed is None else packed.weight.dtype
        return torch.promote_types(self.dtype, own)

    @property
    def lora_detail(self) -> str:
        """Why forwards with LoRAs do not take the path that others take; empty if they do."""
        if self._fast is None:
            return ""
        if not self._fast.takes_loras:
            return "plain blocks run with LoRAs: products of fused blocks in eight bits have no branches"
        return self._fast.loras.detail

    @property
    def lora_memory(self) -> BranchMemory | None:
        """The copies of LoRAs' factors that graphs of the fast path read, if there is one."""
        return None if self._fast is None else self._fast.loras

    def branch_slots(self, by_layer: Mapping[str, Sequence[Branch]]) -> list[tuple[Branches, tuple[Branch, ...]]]:
        """Return the places of a LoRA's branches: in the layers of the module, and in its fast path."""
        own = [(self.branches[name], tuple(branches)) for name, branches in by_layer.items()]
        return own if self._fast is None else own + self._fast.branch_slots(by_layer)

    @property
    def planned(self) -> PlannedPath:
        """The path that runs the class by its token plan, which its family's ``fuse`` has made."""
        return cast("PlannedPath", self._fast)

    @property
    def attention_backend(self) -> str:
        """xDiT's name of the attention backend of its plain modules."""
        return self.layout.attention_backend

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Return the fast path checks since the last call."""
        return () if self._fast is None else self._fast.take_checks()

    @property
    def paths(self) -> ForwardPaths | None:
        """The paths of the forwards of the fast path, if there is one."""
        return None if self._fast is None else self._fast.paths

    @property
    def warm_up_sizes(self) -> Mapping[str, int]:
        """The sizes of the forward that warms up the fast path; empty if there is none."""
        return {} if self._fast is None else self._fast.warm_up_sizes

    def reserve(self) -> int:
        """Allocate the memory that a plug needs besides the lent tensors, so that it cannot fail; return its bytes."""
        if self.packed_layers:
            self.packed_memory.scratch.reserve(self, self.scratch_bytes)
        return 0 if self._fast is None else self._fast.reserve()

    def release(self, *, is_lent: bool = False) -> None:
        """Free the reserved memory if nothing is plugged; that of the scratch buffer not while weights are lent."""
        if self.owner is None:
            if not is_lent:
                self.packed_memory.scratch.release(self)
            if self._fast is not None:
                self._fast.unplug()

    def plug(
        self,
        bindings: Bindings,
        owner: str = "",
        checkpoint: Mapping[str, torch.Tensor | PackedTensor] | None = None,
    ) -> None:
        """Assign ``bindings`` as the parameters, and hold them until :meth:`unplug` or the next plug.

        ``checkpoint`` are the same tensors by canonical name, for the fast path, which is idle without them.
        ``load_state_dict(assign=True)`` takes ten times as long.
        """
        if bindings.keys() != self._slots.keys() | self.packed_layers.keys():
            differing = sorted(bindings.keys() ^ (self._slots.keys() | self.packed_layers.keys()))
            raise Internal(f"bindings do not match the {self.family.name} model: {listed(differing)}", names=differing)
        self.reserve()  # first, since this can fail: it may have been released since the component was prepared
        for target, (parameters, name) in self._slots.items():
            bound = bindings[target]
            assert isinstance(bound, torch.Tensor)
            parameters[name] = torch.nn.Parameter(bound, requires_grad=False)
        for target, layer in self.packed_layers.items():
            packed = bindings[target]
            assert isinstance(packed, PackedTensor)
            layer.plug(packed)
        if self._fast is not None:
            self._fast.plug(checkpoint or {})
            self._fast.paths.use_weights(owner, bindings)
        self.owner, self.had_weights = owner, True

    def unplug(self) -> None:
        """Restore the meta parameters; the model then holds no reference to lent memory."""
        for target, (parameters, name) in self._slots.items():
            parameters[name] = self._empty[target]
        for layer in self.packed_layers.values():
            layer.unplug()
        if self._fast is not None:
            self._fast.unplug()
        self.owner = None
