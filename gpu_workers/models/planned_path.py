"""Run a family's transformer as its diffusers class does, by the class's token plan: eager, compiled or captured.

On one rank it gives the bits of the class. Ranks that share a sequence split its tokens by the plan. A family whose
``fuse`` returns a :class:`PlannedPath` writes no forward of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch
from xfuser.core.distributed import get_sp_group

from xditd.gpu_workers.kernels.stacked_layout import StackedLayout
from xditd.gpu_workers.kernels.static_branches import Loras, Place
from xditd.gpu_workers.models.chosen_attention import chosen_attention
from xditd.gpu_workers.models.compiled_blocks import find_compiled_blocks
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.graph_loras import GraphLoras
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.process_resources import ProcessResources
from xditd.gpu_workers.models.split_checks import CaseKey
from xditd.gpu_workers.models.token_plans import find_plan
from xditd.gpu_workers.packed.linear import BranchedLinear, PackedLinear, packed_layers
from xditd.gpu_workers.parallel.rank_sync import RankSet
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.gpu_workers.parallel.token_shares import TokenShares
from xditd.ipc.errors import Internal

if TYPE_CHECKING:
    from xditd.gpu_workers.kernels.branches import Branch, Branches
    from xditd.gpu_workers.packed.tensors import PackedTensor
    from xditd.gpu_workers.parallel.layouts import ParallelLayout
    from xditd.ipc.status import FusedCheck


class PlannedPath:
    """The forward of one module by its token plan: see :class:`~xditd.gpu_workers.models.operations.FastPath`.

    ``class_name`` is that of diffusers' class, which has a plan, and of which ``module`` has all paths.
    """

    takes_loras: Final = True
    """They are in the module's own layers."""
    warm_up_sizes: Final[Mapping[str, int]] = {}

    def __init__(self, module: torch.nn.Module, class_name: str, layout: ParallelLayout) -> None:
        plan = find_plan(class_name)
        if isinstance(plan, str):
            raise Internal(f"{class_name}: {plan}")
        self._module = module
        self._layout = layout
        self._planned = PlannedModule(module, plan)
        self._shares = TokenShares()
        self._key: Hashable = None
        """That of the latest forward."""
        self.resources = ProcessResources()
        packed = packed_layers(module)
        self.paths = ForwardPaths(
            module,
            class_name,
            layout.device,
            layout.acceleration,
            is_leader=layout.rank == 0,
            among=RankSet.SEQUENCE,
            blocks=lambda: find_compiled_blocks(module, self._planned, self.resources.graphs, lambda: self._key),
            counts=packed[0].memory.counts if packed else None,
        )
        self.loras = GraphLoras(StackedLayout, self._lora_places, self.paths, RankSet.SEQUENCE)

    def run(
        self,
        arguments: Mapping[str, Any],
        *,
        key: Hashable = None,
        loras: Loras = (),
        why_eager: str = "",
    ) -> Any:
        """Run the class's forward; every rank of the sequence returns the whole result.

        ``loras`` are those that are switched on, with their strengths, as in ``CallOptions``. ``key`` is what the
        forward depends on besides its arguments, such as a variant. Of a cache of keys and values, as the plan declares
        it, each rank has its share; such forwards have to be eager: ``why_eager`` says why, for the status.

        Raises:
            PlanFault: a stream has fewer tokens than there are ranks.
        """

        def call(given: Mapping[str, Any]) -> Any:
            with chosen_attention(self._layout):
                if self._layout.degrees.sequence == 1:
                    return self._module(**given)
                return self._planned.run(lambda: self._module(**given), self._ranks, self._shares)

        self._key = key
        layout = self.loras.use(loras)
        if not self.paths.is_on or (loras and layout is None):
            return call(arguments)
        if why_eager:
            self.paths.note_eager({name: each for name, each in arguments.items() if _is_plain(each)}, why_eager)
            return call(arguments)
        case = CaseKey.of("forward", key, arguments, 0)
        if layout is not None:
            return self.loras.run(layout, case, arguments, call, call, on_all_ranks=True)
        return self.paths.run(case, arguments, call, call, on_all_ranks=True)

    def _lora_places(self) -> list[Place]:
        layers = (each for each in self._module.modules() if isinstance(each, BranchedLinear | PackedLinear))
        return [Place(each.branches, each.out_features) for each in layers]

    @cached_property
    def _ranks(self) -> Ranks:
        degrees = self._layout.degrees
        if degrees.sequence == degrees.world_size:
            return Ranks(None, self._layout.rank, degrees.world_size, peers=self.resources.peers)
        return Ranks(get_sp_group().device_group, self._layout.sequence_rank, degrees.sequence)

    def branch_slots(
        self,
        by_layer: Mapping[str, Sequence[Branch]],  # noqa: ARG002  # the module's own layers have them
    ) -> list[tuple[Branches, tuple[Branch, ...]]]:
        """Return no places besides those in the module's layers."""
        return []

    def take_checks(self) -> tuple[FusedCheck, ...]:
        return ()

    def reserve(self) -> int:
        return 0

    def plug(self, checkpoint: Mapping[str, torch.Tensor | PackedTensor]) -> None:
        """The module has its tensors."""

    def unplug(self) -> None:
        """Forget the runs that were to be compared, and free the memory for factors."""
        self.paths.drop_runs()
        self.loras.clear()


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor | bool | int | float | str | None)
