"""Modules that run as their own class does: built from a client's description, cached, and given lent tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch

from xditd.gpu_workers.kernels.cache_folder import cache_folder
from xditd.gpu_workers.models.class_building import apply_state, check_versions, set_tensors, tensor_names
from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.gpu_workers.models.configured_classes import build_module, find_model_class
from xditd.gpu_workers.models.entries import Bindings, TensorInfo
from xditd.gpu_workers.models.forward_paths import ForwardPaths
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
from xditd.gpu_workers.parallel import peer_memory
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.peer_exchange import PeerExchange
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.ipc import limits, module_state
from xditd.ipc.errors import Unsupported
from xditd.ipc.facts import METHODS, ComponentFacts, MethodFacts, ModuleFacts
from xditd.ipc.field_types import DType
from xditd.ipc.module_state import ModuleState
from xditd.ipc.packed import PackedWeight
from xditd.ipc.status import FusedCheck, SplitCheck
from xditd.ipc.tensors import ComponentKind, Manifest, ModuleDescription
from xditd.ipc.transports.module_walk import method_signature, walk_module
from xditd.ipc.transports.tensor_views import dtype_name, torch_dtype

_Key = tuple[ModuleDescription, torch.dtype | None, frozenset[tuple[str, TensorInfo]] | None]

MAX_MODELS: Final = 16
"""Modules that stay without weights; each change of an attribute makes another one."""


class ClassModel:
    """A module without weights. ``owner`` is the component id of the weights that are plugged, or ``None``.

    With a ``state`` in the description, the client lends every tensor of a module, also those that the class makes
    itself. Without it, the tensors are those of a ``checkpoint`` that ``from_pretrained`` would load in ``dtype``.
    """

    def __init__(
        self,
        described: ModuleDescription,
        layout: ParallelLayout,
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
        return 0

    def release(self) -> None:
        """There is no reserved memory."""

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
        set_tensors(
            self.module, self.state, {name: each for name, each in bindings.items() if isinstance(each, torch.Tensor)}
        )
        self.paths.use_weights(owner, bindings)

    def unplug(self) -> None:
        """Drop all references to lent memory, and what forwards have stored in the module since."""
        self.paths.drop_runs()
        self._without_weights.restore()
        self.owner = None

    def _compile_blocks(self, graphs: Callable[[], CompiledGraphs] | None) -> CompiledBlocks | str:
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


@dataclass(frozen=True)
class _ClassAsFamily:
    """What the workers read of every component's ``Family``, for a module that has none."""

    name: str
    kind: str = "module"

    def heads(self, _: object) -> int:
        """There are no attention heads to distribute: every rank runs the whole module."""
        return 0


@dataclass(frozen=True)
class ModuleMatch:
    """A manifest matched to a module; see :class:`~xditd.gpu_workers.models.model_cache.CheckpointMatch`.

    ``dtype`` is that of most elements. ``sources`` has the name in the manifest of each tensor of the module.
    """

    model: ClassModel
    dtype: torch.dtype
    sources: Mapping[str, str]
    is_reused: bool
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the tensors whose dtype ``from_pretrained`` changes."""
    config: None = None
    """A module has no configuration of a family."""
    _converted: dict[str, torch.Tensor] = field(default_factory=dict)
    """The memory of these tensors, once :meth:`reserve` has allocated it."""

    @property
    def family(self) -> _ClassAsFamily:
        return _ClassAsFamily(self.model.class_name)

    @property
    def packed(self) -> Mapping[str, PackedWeight]:
        """No module that runs as its class has packed weights."""
        return {}

    @property
    def read_names(self) -> set[str]:
        """The names in the manifest of all tensors that it uses."""
        return set(self.sources.values())

    def convert(self, tensors: dict[str, torch.Tensor], label: str) -> list[torch.Tensor]:  # noqa: ARG002
        """There is nothing to dequantise."""
        return []

    def reserve(self) -> int:
        """Allocate the memory of tensors in another dtype, so that :meth:`bind` cannot fail; return its bytes."""
        plan = self.model.plan
        if plan is not None:
            for name, shape in self.shapes.items():
                self._converted[name] = torch.empty(shape, dtype=plan.dtypes[name], device=self.model.device)
        return sum(each.nbytes for each in self._converted.values())

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> Bindings:
        """Return the module's tensors by name: views of ``tensors``, and converted copies."""
        found: Bindings = {name: tensors[source] for name, source in self.sources.items()}
        for name, converted in self._converted.items():
            found[name] = converted.copy_(tensors[self.sources[name]])
        return found

    def by_canonical_name(self, tensors: Mapping[str, torch.Tensor]) -> Bindings:
        return dict(tensors)

    def facts(self, manifest: Manifest) -> ComponentFacts:
        """Return the facts that clients get of a component."""
        sizes: Counter[DType] = Counter()
        for spec in manifest.tensors:
            sizes[spec.dtype] += spec.extent_bytes
        return ComponentFacts(
            family=self.model.class_name,
            class_name=self.model.class_name,
            kind=ComponentKind.MODULE,
            dtype=dtype_name(self.dtype),
            bytes_by_dtype=dict(sizes),
            module=ModuleFacts(
                methods=self.model.methods(),
                layout="rows" if isinstance(self.model.planned, str) else "tokens",
                layout_reason=self.model.planned if isinstance(self.model.planned, str) else "",
            ),
        )


class ClassModels:
    """The modules of this process, by their descriptions, and by the checkpoint's names and dtype without a state."""

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout
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
            self._graphs = CompiledGraphs(cache_folder("graphs"), self._layout.device)
        return self._graphs

    @property
    def paths(self) -> list[ForwardPaths]:
        """The paths of the forwards of all modules."""
        return [model.paths for model in self._models.values()]

    def match(self, described: ModuleDescription, tensors: Mapping[str, TensorInfo]) -> ModuleMatch:
        """Build or reuse the module of a manifest, and check its tensors.

        Raises:
            Unsupported: see ``configured_classes.build_module`` and ``apply_state``, and ``pretrained.plan_load``.
            UnsupportedDtype: a dtype in which no class computes.
            BadRequest: a configuration or a state that cannot be read.
            BadCheckpoint: the tensors do not fit the class.
        """
        if described.state:
            return self._match_module(described, tensors)
        dtype = main_dtype(find_model_class(described.class_name), tensors)
        key = (described, dtype, frozenset(tensors.items()))
        model = self._models.get(key)
        is_reused = model is not None
        if model is None:
            model = ClassModel(described, self._layout, dtype, tensors, self._compiled_graphs, self._peers)
        self._keep(key, model, is_reused=is_reused)
        assert model.plan is not None
        shapes = {name: tensors[model.plan.sources[name]].shape for name in converted_names(model.plan, tensors)}
        return ModuleMatch(model, dtype, model.plan.sources, is_reused, shapes)

    def _match_module(self, described: ModuleDescription, tensors: Mapping[str, TensorInfo]) -> ModuleMatch:
        model = self._models.get((described, None, None))
        is_reused = model is not None
        if model is None:
            model = ClassModel(described, self._layout, graphs=self._compiled_graphs, peers=self._peers)
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
