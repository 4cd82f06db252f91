"""LoRAs of fused FLUX.1 blocks: their branches beside projections, in memory that graphs can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from xditd.gpu_workers.families.flux1.block_weights import (
    Blocks,
    Norm,
    bind_blocks,
    layer_places,
    modulation_names,
    parts_of,
    product_shapes,
)
from xditd.gpu_workers.kernels.branched_products import BranchedProducts, BranchTable
from xditd.gpu_workers.kernels.branches import Branch, Branches
from xditd.gpu_workers.kernels.products import Products, TensorRows
from xditd.gpu_workers.kernels.stacked_layout import StackedLayout
from xditd.gpu_workers.kernels.static_branches import StaticBranches, StaticCounts
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.operations import CallOptions
from xditd.gpu_workers.models.split_checks import CaseKey
from xditd.gpu_workers.parallel.rank_sync import RankSet, agree

if TYPE_CHECKING:
    from xditd.gpu_workers.families.flux1.config import Flux1Config


class ActiveLoras(NamedTuple):
    """The LoRAs of a forward: ``layout`` has their factors, unless they are added one by one."""

    layout: StackedLayout | None

    @property
    def title(self) -> str:
        """What reports of paths say of them."""
        return "" if self.layout is None else self.layout.title


class FusedLoras:
    """The LoRAs of one model, whose forwards have ``paths``."""

    def __init__(self, config: Flux1Config, paths: ForwardPaths) -> None:
        self._config = config
        self._paths = paths
        self._table = BranchTable(parts_of(config), layer_places(config))
        self._branched: tuple[BranchedProducts, Blocks] | None = None
        places = self._table.places(product_shapes(config))
        self._static = StaticBranches(StackedLayout, places, partial(agree, among=RankSet.SEQUENCE), self._forget)

    @property
    def counts(self) -> StaticCounts:
        return self._static.counts

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that graphs read, and of other copies of factors."""
        return self._static.nbytes + self._table.stacks.nbytes

    @property
    def detail(self) -> str:
        """Why the last forward with LoRAs had no graph, as others may have; empty if it may have one."""
        return f"fused blocks run with LoRAs without a graph: {self.counts.refusal}" if self.counts.refusal else ""

    def slots(self, by_layer: Mapping[str, Sequence[Branch]]) -> list[tuple[Branches, tuple[Branch, ...]]]:
        """Return the places of a LoRA's branches in fused blocks, from those of the module's layers."""
        return self._table.slots(by_layer)

    def modulations(self) -> tuple[list[Branches], list[Branches]]:
        """Return the branches of modulations: of double blocks, and of single ones."""
        doubles, singles = modulation_names(self._config)
        return [self._table.at(name) for name in doubles], [self._table.at(name) for name in singles]

    def bind(self, products: Products[Any, Any], norm: Norm) -> None:
        """Find the weights of all blocks, if these products take branches."""
        self._branched = None
        if isinstance(products, TensorRows):
            branched = BranchedProducts(products, self._table)
            self._branched = branched, bind_blocks(self._config, branched.linear, norm)

    def unbind(self) -> None:
        """Drop the weights."""
        self._branched = None

    def clear(self) -> None:
        """Free the memory for factors, and the graphs that read it."""
        self._static.clear()

    def use(self, options: CallOptions) -> ActiveLoras | None:
        """Return the LoRAs of a forward, if it has any. All ranks of the sequence call this for the same forwards."""
        if not options.loras:
            return None
        return ActiveLoras(self._static.use(options.loras) if self._paths.captures else None)

    def count(self, loras: ActiveLoras | None, graphs: int) -> None:
        """Count a forward, if it had LoRAs, and the graphs that were launched for it."""
        if loras is not None:
            self.counts.forwards += 1
            self.counts.launched += graphs

    def blocks(self, loras: ActiveLoras) -> tuple[Any, Blocks]:
        """Return the products and weights of a forward with LoRAs."""
        assert self._branched is not None
        self._branched[0].layout = loras.layout
        return self._branched

    def _forget(self, serial: int) -> None:
        self._paths.forget(serial)


def key_of(forward: tuple[object, ...], loras: ActiveLoras | None) -> CaseKey:
    """Return the key of a forward of blocks, with the layout of its LoRAs."""
    key = CaseKey(forward, ())
    return key if loras is None or loras.layout is None else key.of_layout(loras.layout.serial)
