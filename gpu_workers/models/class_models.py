"""The modules of a rank that run as their own class does, cached by the clients' descriptions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final

import torch

from xditd.gpu_workers.kernels.cache_folder import cache_folder
from xditd.gpu_workers.models.class_model import ClassModel
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.gpu_workers.models.configured_classes import find_model_class
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.module_match import ModuleMatch
from xditd.gpu_workers.models.operations import BranchMemory
from xditd.gpu_workers.models.packed_modules import as_loaded
from xditd.gpu_workers.models.pretrained import (
    converted_names,
    main_dtype,
)
from xditd.gpu_workers.models.process_resources import ProcessResources
from xditd.gpu_workers.packed.linear import PackedMemory
from xditd.gpu_workers.parallel import peer_memory
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.parallel.peer_exchange import PeerExchange
from xditd.ipc import limits
from xditd.ipc.status import SplitCheck
from xditd.ipc.tensors import ModuleDescription
from xditd.ipc.transports.tensor_views import torch_dtype

_Key = tuple[ModuleDescription, torch.dtype | None, frozenset[tuple[str, TensorInfo]] | None]

MAX_MODELS: Final = 16
"""Modules that stay without weights; each change of an attribute makes another one."""


def load_dtype(kind: type, tensors: Mapping[str, TensorInfo], compute_dtype: torch.dtype | None = None) -> torch.dtype:
    """Return the ``torch_dtype`` with which a class loads a checkpoint: ``compute_dtype`` if weights are packed.

    Without packed weights, or without ``compute_dtype``, it is that of most elements. Packed weights have to be in the
    compute dtype (``as_loaded``).

    Raises:
        UnsupportedDtype: no class computes in it.
    """
    has_packed = any(info.packed is not None for info in tensors.values())
    return (compute_dtype if has_packed else None) or main_dtype(kind, tensors)


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
        self.dropped = 0

    def take_split_checks(self) -> tuple[SplitCheck, ...]:
        """Return the checks of rows since the last call."""
        found = [check for model in self._models.values() for check in model.split_checks.take_checks()]
        return tuple(found[-limits.MAX_SPLIT_CHECKS :])

    def close(self) -> None:
        """End the compiler's process and the thread that loads compiled graphs."""
        if self._graphs is not None:
            self._graphs.close()

    @property
    def graphs(self) -> CompiledGraphs | None:
        """The compiled graphs of this process, if one was asked for."""
        return self._graphs

    @property
    def resources(self) -> ProcessResources:
        """What models of families share with these."""
        return ProcessResources(self._compiled_graphs, self._peers)

    def _compiled_graphs(self) -> CompiledGraphs:
        """Return the compiled graphs of this process, which stay on disk in the user's folder for caches.

        Raises:
            Unsupported: others can write to that folder.
        """
        if self._graphs is None:
            self._graphs = CompiledGraphs(cache_folder("graphs"), self._layout.device)
        return self._graphs

    def release_idle(self, lent: Collection[int] = ()) -> None:
        """Free the reserved memory of all modules without plugged weights; ``lent`` are the ids of models in use."""
        for model in self._models.values():
            model.release(is_lent=id(model) in lent)

    @property
    def paths(self) -> list[ForwardPaths]:
        """The paths of the forwards of all modules."""
        return [model.paths for model in self._models.values()]

    @property
    def lora_memory(self) -> list[BranchMemory]:
        """The copies of LoRAs' factors of all modules."""
        return [model.loras for model in self._models.values()]

    def match(
        self,
        described: ModuleDescription,
        tensors: Mapping[str, TensorInfo],
        compute_dtype: torch.dtype | None = None,
    ) -> ModuleMatch:
        """Build or reuse the module of a manifest, and check its tensors.

        With packed weights the module is loaded in ``compute_dtype``, if the client gave one, whatever plain weights
        there are: a class has one ``torch_dtype``. Without packed weights it changes nothing.

        Raises:
            Unsupported: see ``configured_classes.build_module`` and ``apply_state``, and ``pretrained.plan_load``.
            UnsupportedDtype: a dtype in which no class computes.
            BadRequest: a configuration or a state that cannot be read.
            BadCheckpoint: the tensors do not fit the class.
        """
        if described.state:
            return self._match_module(described, tensors)
        tensors = as_loaded(tensors, compute_dtype)
        dtype = load_dtype(find_model_class(described.class_name), tensors, compute_dtype)
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
                self.dropped += 1
