"""Modules that run as their own class does: built from a client's description, cached, and given lent tensors."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch

from xditd.gpu_workers.models.class_building import apply_state, check_versions, set_tensors, tensor_names
from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.gpu_workers.models.configured_classes import build_module, find_model_class
from xditd.gpu_workers.models.entries import Bindings, TensorInfo
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.module_match import ModuleMatch
from xditd.gpu_workers.models.packed_modules import as_loaded, packed_targets, without_weights
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.pretrained import (
    LoadPlan,
    check_fit,
    converted_names,
    finish_buffers,
    main_dtype,
    plan_load,
)
from xditd.gpu_workers.models.snapshots import Snapshot
from xditd.gpu_workers.models.split_checks import SplitChecks
from xditd.gpu_workers.models.token_plans import PlanFault, find_plan
from xditd.gpu_workers.packed.linear import PackedLinear, PackedMemory, largest_bytes, pack_linears
from xditd.gpu_workers.parallel import peer_memory
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.peer_exchange import PeerExchange
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.ipc import limits, module_state
from xditd.ipc.errors import Unsupported
from xditd.ipc.facts import METHODS, MethodFacts
from xditd.ipc.module_state import ModuleState
from xditd.ipc.status import FusedCheck, SplitCheck
from xditd.ipc.tensors import ModuleDescription
from xditd.ipc.transports.module_walk import method_signature, walk_module
from xditd.ipc.transports.tensor_views import torch_dtype

_Key = tuple[ModuleDescription, torch.dtype | None, frozenset[tuple[str, TensorInfo]] | None]

MAX_MODELS: Final = 16
"""Modules that stay without weights; each change of an attribute makes another one."""


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
        memory: PackedMemory,
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
            self.is_as_made = apply_state(self.module, self.state)
        else:
            self.module = build_module(described, dtype)
            self.is_as_made = True
            self.plan = plan_load(self.module, checkpoint, dtype)
            if hasattr(self.module, "initialize_weights"):
                finish_buffers(self.module)
            self.state, _ = walk_module(self.module)
        self.class_name = type(self.module).__name__
        self.saved_names = frozenset(self.module.state_dict())
        """The names of the tensors that a checkpoint of this module holds."""
        self._empty = dict(self.module.named_parameters(remove_duplicate=False))
        self._memory = memory
        self.packed_layers = {} if self.plan is None else self._pack(self.plan, checkpoint or {})
        self.scratch_bytes = largest_bytes(self.packed_layers)
        self._move_buffers()
        self.split_checks = SplitChecks(reports=layout.rank == 0)
        """Verdicts on calls, which stay when other weights are plugged."""
        self._without_weights = Snapshot(map(vars, self.module.modules()))
        self.paths = ForwardPaths(
            self.module,
            self.class_name,
            self.device,
            described.acceleration or layout.acceleration,
            is_leader=layout.rank == 0,
            blocks=partial(self._compile_blocks, graphs),
        )
        self.planned = self._plan_tokens()
        """The module with its token plan, or the reason why its tokens cannot be split."""

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
            self._memory.scratch.reserve(self, self.scratch_bytes)
        return 0

    def release(self) -> None:
        """Free the reserved memory if nothing is plugged."""
        if self.owner is None:
            self._memory.scratch.release(self)

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
        self.paths.use_weights(owner, bindings)

    def unplug(self) -> None:
        """Drop all references to lent memory, and what forwards have stored in the module since."""
        self.paths.drop_runs()
        self._without_weights.restore()
        for layer in self.packed_layers.values():
            layer.unplug()
        self.owner = None

    def _pack(self, plan: LoadPlan, checkpoint: Mapping[str, TensorInfo]) -> dict[str, PackedLinear]:
        """Replace the layers of packed weights, which have no parameter ``weight`` from here on."""
        targets = packed_targets(self.module, plan, checkpoint)
        self.state = without_weights(self.state, targets)
        layers: dict[str, PackedLinear] = {}
        for target in targets:
            layers |= pack_linears(self.module, [target], plan.dtypes[target], self._memory)
        return layers

    def _compile_blocks(self, graphs: Callable[[], CompiledGraphs] | None) -> CompiledBlocks | str:
        if self.packed_layers:
            return "its weights are packed"
        if graphs is None:
            return "this process compiles nothing"
        try:
            return CompiledBlocks.of(self.module, self.planned, graphs())
        except Unsupported as error:
            return error.detail
        except (OSError, RuntimeError) as error:  # no home folder, one that cannot be written to, a full disk
            return f"the folder of compiled graphs: {error}"

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


class ClassModels:
    """The modules of this process, by their descriptions, and by the checkpoint's names and dtype without a state."""

    def __init__(self, layout: ParallelLayout, memory: PackedMemory | None = None) -> None:
        self._layout = layout
        self._memory = memory or PackedMemory(layout.device)
        self._models: dict[_Key, ClassModel] = {}
        self._graphs: CompiledGraphs | None = None
        self._peers: PeerExchange | None = None
        if layout.world_size > 1 and layout.device.type == "cuda" and peer_memory.is_possible(layout.world_size):
            self._peers = PeerExchange(layout.device, layout.rank, layout.world_size)
        self.built = 0
        self.reused = 0

    def take_split_checks(self) -> tuple[SplitCheck, ...]:
        """Return the checks of rows since the last call."""
        found = [check for model in self._models.values() for check in model.split_checks.take_checks()]
        return tuple(found[-limits.MAX_SPLIT_CHECKS :])

    def close(self) -> None:
        """End what compiles."""
        if self._graphs is not None:
            self._graphs.close()

    def _compiled_graphs(self) -> CompiledGraphs:
        """Return the compiled graphs of this process, which stay on disk in the user's folder for caches.

        Raises:
            Unsupported: others can write to that folder.
        """
        if self._graphs is None:
            caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            self._graphs = CompiledGraphs(Path(caches, "xditd", "graphs"), self._layout.device)
        return self._graphs

    def release_idle(self) -> None:
        """Free the reserved memory of all modules without plugged weights."""
        for model in self._models.values():
            model.release()

    @property
    def paths(self) -> list[ForwardPaths]:
        """The paths of the forwards of all modules."""
        return [model.paths for model in self._models.values()]

    def match(
        self,
        described: ModuleDescription,
        tensors: Mapping[str, TensorInfo],
        compute_dtype: torch.dtype | None = None,
    ) -> ModuleMatch:
        """Build or reuse the module of a manifest, and check its tensors.

        ``compute_dtype`` is that of packed weights, if the client gave one.

        Raises:
            Unsupported: see ``configured_classes.build_module`` and ``apply_state``, and ``pretrained.plan_load``.
            UnsupportedDtype: a dtype in which no class computes.
            BadRequest: a configuration or a state that cannot be read.
            BadCheckpoint: the tensors do not fit the class.
        """
        if described.state:
            return self._match_module(described, tensors)
        tensors = as_loaded(tensors, compute_dtype)
        dtype = main_dtype(find_model_class(described.class_name), tensors)
        key = (described, dtype, frozenset(tensors.items()))
        model = self._models.get(key)
        is_reused = model is not None
        if model is None:
            model = ClassModel(
                described, self._layout, self._memory, dtype, tensors, self._compiled_graphs, self._peers
            )
        self._keep(key, model, is_reused=is_reused)
        assert model.plan is not None
        sources = model.plan.sources
        packed = {source: info.packed for source in sources.values() for info in [tensors[source]] if info.packed}
        converted = [name for name in converted_names(model.plan, tensors) if sources[name] not in packed]
        shapes = {name: tensors[sources[name]].shape for name in converted}
        return ModuleMatch(model, dtype, sources, is_reused, shapes, packed)

    def _match_module(self, described: ModuleDescription, tensors: Mapping[str, TensorInfo]) -> ModuleMatch:
        model = self._models.get((described, None, None))
        is_reused = model is not None
        if model is None:
            model = ClassModel(described, self._layout, self._memory, graphs=self._compiled_graphs, peers=self._peers)
        model.check(tensors)
        self._keep((described, None, None), model, is_reused=is_reused)
        elements: Counter[str] = Counter()
        for info in tensors.values():
            elements[info.dtype] += math.prod(info.shape)
        main = torch_dtype(elements.most_common(1)[0][0])
        return ModuleMatch(model, main, {name: name for name in tensors}, is_reused)

    def _keep(self, key: _Key, model: ClassModel, *, is_reused: bool) -> None:
        """Keep a module for the next manifest like this one, and drop those that were not used for longest."""
        self.built += not is_reused
        self.reused += is_reused
        self._models.pop(key, None)
        self._models[key] = model  # the last one is the one that was used last
        for each in [each for each, idle in self._models.items() if idle.owner is None and idle is not model]:
            if len(self._models) > MAX_MODELS:
                del self._models[each]
