"""A module that runs as its own class does: built from a client's description, and given lent tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import cast

import torch

from xditd.gpu_workers.kernels.branches import Branch, Branches
from xditd.gpu_workers.kernels.static_branches import Place
from xditd.gpu_workers.models.cached_methods import CachedMethods
from xditd.gpu_workers.models.class_branches import branches_of, targets_in
from xditd.gpu_workers.models.class_building import apply_state, check_versions, set_tensors, tensor_names
from xditd.gpu_workers.models.class_layout import SeparateLayout
from xditd.gpu_workers.models.compiled_blocks import find_compiled_blocks
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.gpu_workers.models.configured_classes import build_module
from xditd.gpu_workers.models.entries import Bindings, TensorInfo
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.graph_loras import GraphLoras
from xditd.gpu_workers.models.lora_targets import Target
from xditd.gpu_workers.models.packed_modules import packed_targets, without_weights
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.pretrained import (
    LoadPlan,
    check_fit,
    finish_buffers,
    plan_load,
)
from xditd.gpu_workers.models.snapshots import Snapshot
from xditd.gpu_workers.models.split_checks import SplitChecks
from xditd.gpu_workers.models.token_plans import PlanFault, find_plan
from xditd.gpu_workers.packed.linear import PackedLinear, PackedMemory, largest_bytes, pack_linears
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.peer_exchange import PeerExchange
from xditd.gpu_workers.parallel.rank_sync import RankSet
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.ipc import module_state
from xditd.ipc.facts import METHODS, MethodFacts
from xditd.ipc.loras import LoraPart
from xditd.ipc.module_state import ModuleState
from xditd.ipc.status import FusedCheck
from xditd.ipc.tensors import ModuleDescription
from xditd.ipc.transports.module_walk import method_signature, walk_module


class ClassModel:
    """A module without weights. ``owner`` is the component id of the weights that are plugged, or ``None``.

    With a ``state`` in the description, the client lends every tensor of a module, also those that the class makes
    itself. Without it, the tensors are those of a ``checkpoint`` that ``from_pretrained`` would load in ``dtype``; some
    may be packed weights, which ``packed_layers`` multiply, by the names of these.
    """

    def __init__(
        self,
        described: ModuleDescription,
        layout: ParallelLayout,
        packed_memory: PackedMemory,
        dtype: torch.dtype | None = None,
        checkpoint: Mapping[str, TensorInfo] | None = None,
        graphs: Callable[[], CompiledGraphs] | None = None,
        peers: PeerExchange | None = None,
    ) -> None:
        self.layout = layout
        self.device = layout.device
        self.ranks = Ranks(None, layout.rank, layout.world_size, peers=peers)
        """Those that share its forwards: all of the group."""
        self.owner: str | None = None
        self.plan: LoadPlan | None = None
        """Which tensors of a checkpoint it gets; ``None`` with a state."""
        self.state: ModuleState
        if checkpoint is None or dtype is None:
            self.state = module_state.decode(described.state)
            check_versions(self.state.versions)
            self.module = build_module(described)
            self.difference = apply_state(self.module, self.state)
            """How a live module differs from what its class makes, or ""."""
        else:
            self.module = build_module(described, dtype)
            self.difference = ""
            self.plan = plan_load(self.module, checkpoint, dtype)
            if hasattr(self.module, "initialize_weights"):
                finish_buffers(self.module)
            self.state, _ = walk_module(self.module)
        self.class_name = type(self.module).__name__
        self.saved_names = frozenset(self.module.state_dict())
        """The names of the tensors that a checkpoint of this module holds."""
        self.made = self._made_tensors()
        """The other tensors, as the class makes them: tables of positions, for the most part."""
        self._empty = dict(self.module.named_parameters(remove_duplicate=False))
        self.packed_memory = packed_memory
        self.packed_layers = {} if self.plan is None else self._pack(self.plan, checkpoint or {})
        self.scratch_bytes = largest_bytes(self.packed_layers.values())
        self._move_buffers()
        self._cached_methods: dict[str, tuple[Bindings, CachedMethods]] = {}
        """By owner, for the tensors with which it was lent last. Captured graphs read the results."""
        self.split_checks = SplitChecks(reports=layout.rank == 0)
        """Verdicts on calls, which stay when other weights are plugged."""
        self._without_weights = Snapshot(map(vars, self.module.modules()))
        self.paths = ForwardPaths(
            self.module,
            self.class_name,
            self.device,
            described.acceleration or layout.acceleration,
            is_leader=layout.rank == 0,
            blocks=lambda: find_compiled_blocks(self.module, self.planned, graphs),
            counts=packed_memory.counts,
        )
        self.loras = GraphLoras(SeparateLayout, self._lora_places, self.paths, RankSet.GROUP)
        self.planned = self._plan_tokens()
        """The module with its token plan, or the reason why its tokens cannot be split."""

    @property
    def title(self) -> str:
        """The class's name, for messages."""
        return self.class_name

    def branch_dtype(self, layer: str) -> torch.dtype:
        """Return the dtype into which PEFT converts the factors of a layer when it loads them: that of its weight."""
        weight = self.module.get_submodule(layer).weight
        assert isinstance(weight, torch.Tensor)
        return weight.dtype

    @cached_property
    def branches(self) -> Mapping[str, Branches]:
        """The LoRAs' places, by the names of linear layers."""
        return branches_of(self.module)

    @cached_property
    def lora_targets(self) -> Mapping[str, Target]:
        """The layers with branches by the names that a LoRA has for them."""
        return targets_in(self.module, self.branches)

    def branch_slots(self, by_layer: Mapping[str, Sequence[Branch]]) -> list[tuple[Branches, tuple[Branch, ...]]]:
        """Return the places of a LoRA's branches."""
        return [(self.branches[name], tuple(branches)) for name, branches in by_layer.items()]

    @property
    def lora_part(self) -> LoraPart:
        """Which layers of a LoRA are for this module."""
        return "text_encoder" if type(self.module).__module__.startswith("transformers.") else "model"

    @property
    def lora_detail(self) -> str:
        """Why forwards with LoRAs take another path than others; empty if they do not."""
        return self.loras.detail

    def _lora_places(self) -> list[Place]:
        return [
            Place(branches, cast(torch.nn.Linear, self.module.get_submodule(path)).out_features)
            for path, branches in self.branches.items()
        ]

    def check(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Check that a manifest lends all tensors of the state, and nothing else.

        Raises:
            BadCheckpoint: missing, unexpected and wrongly shaped tensors.
        """
        needed = set(tensor_names(self.state))
        misshapen = [
            f"{name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}"
            for name, parameter in self._empty.items()
            if name in tensors and parameter.numel() and tuple(parameter.shape) != tensors[name].shape
        ]
        lists = {"missing": needed - tensors.keys(), "unexpected": tensors.keys() - needed, "wrongly shaped": misshapen}
        check_fit(lists, self.class_name)

    def methods(self) -> dict[str, MethodFacts]:
        """Return the methods that can be called, with their arguments."""
        found = {}
        for name in METHODS:
            method = getattr(type(self.module), name, None)
            if method is not None:
                parameters = list(method_signature(method).parameters.values())[1:]
                named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
                found[name] = MethodFacts(
                    arguments=tuple(each.name for each in named),
                    needed=tuple(each.name for each in named if each.default is each.empty),
                    takes_others=any(each.kind is each.VAR_KEYWORD for each in parameters),
                )
        return found

    def take_checks(self) -> tuple[FusedCheck, ...]:
        return ()

    def reserve(self) -> int:
        """Make room in the scratch buffer, so that a plug cannot fail; it counts apart from copied memory."""
        if self.packed_layers:
            self.packed_memory.scratch.reserve(self, self.scratch_bytes)
        return 0

    def release(self, *, is_lent: bool = False) -> None:
        """Free the reserved memory if nothing is plugged, and no weights are lent."""
        if self.owner is None:
            self._forget_cached_methods()
            self.loras.clear()
            if not is_lent:
                self.packed_memory.scratch.release(self)

    def plug(
        self,
        bindings: Bindings,
        owner: str = "",
        checkpoint: Bindings | None = None,  # noqa: ARG002  # that of models with a fast path
    ) -> None:
        """Give the module these tensors, and hold them until :meth:`unplug` or the next plug."""
        if self.owner is not None:
            self.unplug()
        self.owner = owner  # first, so that a plug that fails is undone by the next one
        self.reserve()
        plain: dict[str, torch.Tensor] = {}
        for name, each in bindings.items():
            if isinstance(each, torch.Tensor):
                plain[name] = each
            else:
                self.packed_layers[name].plug(each)
        set_tensors(self.module, self.state, plain)
        self._use_cached_methods(owner, bindings)
        self.paths.use_weights(owner, bindings)

    def unplug(self) -> None:
        """Drop all references to lent memory, and what forwards have stored in the module since."""
        self.paths.drop_runs()
        self._without_weights.restore()
        for layer in self.packed_layers.values():
            layer.unplug()
        self.owner = None
        if self.device.type == "cpu":
            self._cached_methods.clear()  # results may be views of lent memory, and no graph reads them

    def _use_cached_methods(self, owner: str, bindings: Bindings) -> None:
        self._forget_cached_methods()
        known = self._cached_methods.get(owner)
        if known is None or known[0] is not bindings:
            known = self._cached_methods[owner] = bindings, CachedMethods(self.module)
        known[1].install()

    def _forget_cached_methods(self) -> None:
        """Forget results for tensors that are unmapped: their map is empty."""
        self._cached_methods = {owner: each for owner, each in self._cached_methods.items() if each[0]}

    def _pack(self, plan: LoadPlan, checkpoint: Mapping[str, TensorInfo]) -> dict[str, PackedLinear]:
        """Replace the layers of packed weights, which have no parameter ``weight`` from here on."""
        targets = packed_targets(self.module, plan, checkpoint)
        self.state = without_weights(self.state, targets)
        return pack_linears(self.module, {target: plan.dtypes[target] for target in targets}, self.packed_memory)

    def _made_tensors(self) -> dict[str, torch.Tensor]:
        if self.difference or self.saved_names.issuperset(tensor_names(self.state)):
            return {}
        tensors = walk_module(self.module)[1]
        return {name: each for name, each in tensors.items() if name not in self.saved_names and not each.is_meta}

    def _plan_tokens(self) -> PlannedModule | str:
        plan = find_plan(self.class_name)
        if isinstance(plan, str):
            return plan
        try:
            return PlannedModule(self.module, plan)
        except PlanFault as fault:
            return fault.detail

    def _move_buffers(self) -> None:
        """Move the buffers that the class made to the device of the weights, as ``module.to(device)`` does."""
        for submodule in self.module.modules():
            for name, buffer in submodule._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    submodule._buffers[name] = buffer.to(self.device)
