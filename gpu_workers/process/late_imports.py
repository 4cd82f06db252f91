"""What the first lend and compiled blocks need, imported module by module between the daemon's commands.

The thread that runs commands imports all of it (docs/starts.md).
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from xditd.gpu_workers.models import block_compiler, registry
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.gpu_workers.process import lean_imports, preload
from xditd.gpu_workers.process.garbage_collection import without_collections
from xditd.gpu_workers.process.lazy_compiler import COMPILER

logger = logging.getLogger(__name__)

QUIET_S: Final = 0.5
"""After a command, how long there must be no other before the next module is imported: one that comes meanwhile waits
for the module."""

FOR_GRAPHS: Final = (
    "sympy",
    "torch.distributed.tensor",
    COMPILER,
    "functorch.compile",
    "torch._inductor.decomposition",
    "torch._inductor.codegen.wrapper",
    "torch._inductor.lowering",
    *block_compiler.LOADERS,
)
"""The modules that load compiled blocks, which are the last two. They import the others, each of which is imported by
itself first, so that no single import takes long."""


class LateImports:
    """The imports that are left, in their order: what lends need, then what comes later.

    A command waits for one module, not for all of them, and a stop is obeyed. A lend waits for what all lends need,
    without transformers: that takes less time than the imports that the lend would make itself.

    ``graphs`` returns the compiled graphs of this process, if there are any. They load once :data:`FOR_GRAPHS` are
    imported: next after a graph was asked for, or last of all with ``compiles``, where blocks of any model may be
    compiled.
    """

    def __init__(
        self,
        graphs: Callable[[], CompiledGraphs | None] = lambda: None,
        *,
        compiles: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._graphs, self._compiles = clock, graphs, compiles
        self._for_lends = deque[Callable[[], None]](partial(preload.import_all, (name,)) for name in preload.FOR_LENDS)
        self._for_lends.append(self._add_families)
        self._after, self._for_graphs = deque(preload.AFTER_LENDS), deque(FOR_GRAPHS)
        self._not_before_s = 0.0
        self._took_s = 0.0

    @property
    def wait_s(self) -> float | None:
        """How long to wait for a command before the next :meth:`run_next`; ``None`` once all is imported."""
        is_left = self._for_lends or self._later() or self._is_asked
        return max(0.0, self._not_before_s - self._clock()) if is_left else None

    def note_command(self) -> None:
        """Wait for :data:`QUIET_S` from now: commands often come one after the other.

        Do not wait while a graph waits to be loaded: where commands never pause, it would never be loaded.
        """
        graphs = self._graphs()
        self._not_before_s = self._clock() + (0.0 if graphs is not None and graphs.waits else QUIET_S)

    def run_next(self) -> None:
        """Import the next module, if there is one and it is time. Let graphs load once they need no further module."""
        if self._clock() >= self._not_before_s:
            self._import_next()
        graphs = self._graphs()
        if graphs is not None and not self._for_graphs:
            graphs.let_load()

    def _import_next(self) -> None:
        if self._for_lends:
            with self._timed():
                self._for_lends.popleft()()
        elif later := self._later():
            with self._timed():
                preload.import_all((later.popleft(),))
        while self._for_graphs and lean_imports.is_imported(self._for_graphs[0]):
            self._for_graphs.popleft()

    def _later(self) -> deque[str]:
        """Return the modules that come after those for lends; the first one is next."""
        if self._is_asked and self._for_graphs:
            return self._for_graphs
        return self._after or (self._for_graphs if self._compiles else deque())

    @property
    def _is_asked(self) -> bool:
        graphs = self._graphs()
        return graphs is not None and graphs.needs_imports

    def finish_for_lend(self) -> None:
        """Import what lends need and is left, at once."""
        if self._for_lends:
            with self._timed():
                while self._for_lends:
                    self._for_lends.popleft()()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        is_for_lends = bool(self._for_lends)
        began_s = time.perf_counter()
        gc.collect()  # else the garbage of commands would be kept with the modules, and memory that it refers to
        with without_collections():
            yield
        if is_for_lends:
            self._took_s += time.perf_counter() - began_s
            if not self._for_lends:
                logger.info("what lends need is imported imports_s=%.2f", self._took_s)

    def _add_families(self) -> None:
        """Import the descriptions of our own families; the operations of each are a step of their own."""
        self._for_lends.extend(partial(preload.import_family, family) for family in registry.own_families())
        self._for_lends.append(partial(preload.import_all, registry.DESCRIBED))
