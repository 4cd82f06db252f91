"""Modules that run as their own class does: built from a client's description, cached, and given lent tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from xditd.gpu_workers.models.class_building import apply_state, build_module, set_tensors, tensor_names
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.row_checks import RowChecks
from xditd.gpu_workers.models.snapshots import Snapshot
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc import limits, module_state
from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.facts import ComponentFacts, MethodFacts, ModuleFacts
from xditd.ipc.module_state import ModuleState
from xditd.ipc.name_lists import listed
from xditd.ipc.status import FusedCheck, RowCheck
from xditd.ipc.tensors import ComponentKind, DType, Manifest, ModuleDescription
from xditd.ipc.transports.module_walk import method_signature, walk_module
from xditd.ipc.transports.tensor_views import dtype_name, torch_dtype

METHODS: Final = ("forward", "encode", "decode")
"""The methods that ``Call`` can run, where a class has them."""

MAX_MODELS: Final = 16
"""Modules that stay without weights; each change of an attribute makes another one."""


class ClassModel:
    """A module without weights of its own. ``owner`` is the component id of the plugged weights, or ``None``."""

    def __init__(self, described: ModuleDescription, label: str, layout: ParallelLayout) -> None:
        self.layout = layout
        self.device = layout.device
        self.owner: str | None = None
        self.module = build_module(described, label)
        self.class_name = type(self.module).__name__
        self._is_complete = bool(described.state)
        """Whether the client lends every tensor, also those that the class makes itself."""
        self.state: ModuleState
        if self._is_complete:
            self.state = module_state.decode(described.state, label)
            self.is_as_made = apply_state(self.module, self.state, label)
        else:
            self.is_as_made = True
            self.state, _ = walk_module(self.module)
        self.saved_names = frozenset(self.module.state_dict())
        """The names of the tensors that a checkpoint of this module holds."""
        self._empty = dict(self.module.named_parameters(remove_duplicate=False))
        self._move_buffers()
        self.row_checks = RowChecks(reports=layout.rank == 0)
        """Verdicts on calls, which stay when other weights are plugged."""
        self._without_weights = Snapshot(map(vars, self.module.modules()))

    def check(self, tensors: Mapping[str, TensorInfo], label: str) -> None:
        """Check that a manifest lends what the module needs, and nothing else.

        Raises:
            BadCheckpoint: missing, unexpected and wrongly shaped tensors.
        """
        needed = set(tensor_names(self.state)) if self._is_complete else self.saved_names
        missing, unexpected = sorted(needed - tensors.keys()), sorted(tensors.keys() - needed)
        misshapen = [
            f"{name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}"
            for name, parameter in self._empty.items()
            if name in tensors and parameter.numel() and tuple(parameter.shape) != tensors[name].shape
        ]
        lists = {"missing": missing, "unexpected": unexpected, "wrongly shaped": misshapen}
        if any(lists.values()):
            parts = [f"{len(names)} {what}: {listed(names)}" for what, names in lists.items() if names]
            raise BadCheckpoint(
                f"{label}: the tensors do not fit {self.class_name}: {'; '.join(parts)}",
                names=[f"{what}: {name}" for what, names in lists.items() for name in names],
            )

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
        bindings: Mapping[str, torch.Tensor],
        owner: str = "",
        checkpoint: Mapping[str, torch.Tensor] | None = None,  # noqa: ARG002  # that of models with a fast path
    ) -> None:
        """Give the module these tensors, and hold them until :meth:`unplug` or the next plug."""
        if self.owner is not None:
            self.unplug()
        self.owner = owner  # first, so that a plug that fails is undone by the next one
        set_tensors(self.module, self.state, bindings)

    def unplug(self) -> None:
        """Drop all references to lent memory, and what forwards have stored in the module since."""
        self._without_weights.restore()
        self.owner = None

    def _move_buffers(self) -> None:
        """Move the buffers that the class made to the device of the weights, as ``module.to(device)`` does."""
        for submodule in self.module.modules():
            for name, buffer in submodule._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    submodule._buffers[name] = buffer.to(self.device)


@dataclass(frozen=True)
class _Kind:
    """The part of a ``Family`` that every component has."""

    name: str
    kind: str = "module"

    def heads(self, _: object) -> int:
        return 0


@dataclass(frozen=True)
class ModuleMatch:
    """A manifest matched to a module; see :class:`~xditd.gpu_workers.models.model_cache.CheckpointMatch`."""

    model: ClassModel
    dtype: torch.dtype
    names: frozenset[str]
    is_reused: bool
    config: None = None

    @property
    def family(self) -> _Kind:
        return _Kind(self.model.class_name)

    @property
    def sources(self) -> Mapping[str, str]:
        return {name: name for name in self.names}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(tensors)

    def by_canonical_name(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
            module=ModuleFacts(methods=self.model.methods()),
        )


class ClassModels:
    """The modules of this process, by their descriptions."""

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout
        self._models: dict[ModuleDescription, ClassModel] = {}
        self.built = 0
        self.reused = 0

    def take_row_checks(self) -> tuple[RowCheck, ...]:
        """Return the checks of rows since the last call."""
        found = [check for model in self._models.values() for check in model.row_checks.take_checks()]
        return tuple(found[-limits.MAX_ROW_CHECKS :])

    def match(self, described: ModuleDescription, tensors: Mapping[str, TensorInfo], label: str) -> ModuleMatch:
        """Build or reuse the module of a manifest, and check its tensors.

        Raises:
            Unsupported: see ``class_building.build_module`` and ``apply_state``.
            BadRequest: a configuration or a state that cannot be read.
            BadCheckpoint: see :meth:`ClassModel.check`.
        """
        model = self._models.get(described)
        is_reused = model is not None
        if model is None:
            model = ClassModel(described, label, self._layout)
        model.check(tensors, label)
        self.built += not is_reused
        self.reused += is_reused
        self._models.pop(described, None)
        self._models[described] = model  # the last one is the one that was used last
        for each in [each for each, idle in self._models.items() if idle.owner is None and idle is not model]:
            if len(self._models) > MAX_MODELS:
                del self._models[each]
        elements: Counter[str] = Counter()
        for info in tensors.values():
            elements[info.dtype] += math.prod(info.shape)
        return ModuleMatch(model, torch_dtype(elements.most_common(1)[0][0]), frozenset(tensors), is_reused)
