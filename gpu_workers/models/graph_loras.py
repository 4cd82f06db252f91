"""The LoRAs beside the layers of a module whose forwards may be captured: in memory that their graphs read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic

from xditd.gpu_workers.kernels.static_branches import LayoutT, Loras, Place, StaticBranches, StaticCounts
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.split_checks import CaseKey
from xditd.gpu_workers.parallel.rank_sync import RankSet, agree


class GraphLoras(Generic[LayoutT]):
    """The LoRAs of one module, whose forwards have ``paths``, in layouts of one ``kind``.

    ``places`` lists the layers that may have branches. All ranks ``among`` which forwards run make the same calls.
    """

    def __init__(
        self, kind: type[LayoutT], places: Callable[[], Sequence[Place]], paths: ForwardPaths, among: RankSet
    ) -> None:
        self._kind = kind
        self._places = places
        self._paths = paths
        self._among = among
        self._static: StaticBranches[LayoutT] | None = None
        self.counts = StaticCounts()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that graphs read."""
        return 0 if self._static is None else self._static.nbytes

    @property
    def detail(self) -> str:
        """Why forwards with LoRAs take another path than others; empty if they do not."""
        if not self._paths.is_on:
            return ""
        if not self._paths.captures:
            return "forwards with LoRAs are eager: compiled blocks have no branches"
        if self.counts.refusal:
            return f"forwards with LoRAs are eager: {self.counts.refusal}"
        return "compiled blocks have no branches: forwards with LoRAs may be captured alone" * self._paths.compiles

    def use(self, loras: Loras, forwards: int = 1) -> LayoutT | None:
        """Return the layout of the LoRAs that are switched on, with their factors; ``None`` if forwards are eager.

        ``forwards`` is the number of those that follow, which counts.
        """
        if not loras:
            return None
        self.counts.forwards += forwards
        if not self._paths.captures:
            return None
        if self._static is None:
            together = partial(agree, among=self._among)
            self._static = StaticBranches(self._kind, self._places(), together, self._paths.forget, counts=self.counts)
        return self._static.use(loras)

    def run(
        self,
        layout: LayoutT,
        key: CaseKey,
        arguments: Any,
        eager: Callable[[Any], Any],
        bare: Callable[[Any], Any],
        *,
        on_all_ranks: bool,
        trial: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Run a forward with the LoRAs of a layout on its path; see ``ForwardPaths.run``."""
        launched = self._paths.launched
        with layout.switched_on():
            result = self._paths.run(
                key.of_layout(layout.serial),
                arguments,
                eager,
                layout.around(bare),
                on_all_ranks=on_all_ranks,
                trial=layout.around(trial or bare),
                note=layout.title,
                may_compile=False,
            )
        self.counts.launched += self._paths.launched - launched
        return result

    def clear(self) -> None:
        """Free the memory for factors, and the graphs that read it."""
        if self._static is not None:
            self._static.clear()
