"""Compile recorded graphs, in a process of its own.

    python -m xditd.gpu_workers.models.block_compiler FOLDER NAME...

While torch traces a graph for its compiler, it replaces methods of ``torch.nn.Module`` in the whole process, and the
compiler holds the interpreter for seconds. So a process that serves forwards compiles nothing: it loads what this
one leaves in the folder. A graph that cannot be compiled leaves its reason.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch

from xditd.gpu_workers.models.block_graphs import BlockGraph
from xditd.gpu_workers.models.block_rewrites import rewrite

GRAPH: Final = "graph.json"
ARTIFACT: Final = "artifact"
FAILED: Final = "failed.txt"
"""The files in the folder of a graph: its operations, the compiled code, and the reason why it is not compiled."""

LOADERS: Final = ("torch._inductor.compile_fx", "torch._inductor.standalone_compile")
"""The modules that ``load`` needs. They import many others."""

MAX_REASON_CHARS: Final = 300

_STDIN: Final = 0
_NICENESS: Final = 5
"""The compiler runs at a lower priority than processes that serve forwards, and still gets time on busy processors."""


def main(folder: Path, names: list[str]) -> None:
    """Compile the graphs of these names that are not compiled yet, while the parent lives."""
    os.nice(_NICENESS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    torch.set_num_threads(1)
    for name in names:
        compile_graph(folder / name)


def _end_with_parent() -> None:
    # The parent writes nothing and holds the other end. Not by sys.stdin: while a thread reads that, Python cannot end.
    os.read(_STDIN, 1)
    os._exit(1)


def compile_graph(folder: Path) -> None:
    """Compile the graph of a folder, unless it is done; a fault becomes the reason in ``FAILED``.

    Other ranks may ask for the same graph: one process makes it, and the others wait for that.
    """
    with (folder / GRAPH).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (folder / ARTIFACT).exists() and not (folder / FAILED).exists():
            _compile(folder, file.read())


def _compile(folder: Path, encoded: bytes) -> None:
    made = folder / f"{ARTIFACT}.{os.getpid()}"
    try:
        from torch._inductor.standalone_compile import standalone_compile
        from torch._subclasses import FakeTensorMode

        graph = BlockGraph.decode(encoded)
        with FakeTensorMode():
            examples = [each.empty() for each in graph.inputs]
        module = graph.to_torch()
        rewrite(module, graph.inputs)
        artifact = standalone_compile(module, examples, dynamic_shapes="from_graph", options={})
        artifact.save(path=str(made), format="binary")
        load(made)  # which compiles what a loaded graph needs besides
        os.replace(made, folder / ARTIFACT)
    except Exception as error:  # noqa: BLE001  # whatever a compiler raises
        made.unlink(missing_ok=True)
        (folder / FAILED).write_text(one_line(error))


def import_loaders() -> None:
    """Import :data:`LOADERS`. This takes seconds, unless the modules were imported one by one (``late_imports``)."""
    for name in LOADERS:
        import_module(name)


def has_loaders() -> bool:
    """Return whether :data:`LOADERS` are imported. Only the thread that imports them may ask.

    Another thread would see a module whose code still runs.
    """
    return all(name in sys.modules for name in LOADERS)


def load(path: Path) -> Any:
    """Load compiled code: a function that takes the inputs of a graph, and returns its results."""
    # Imported here: it takes seconds (see import_loaders).
    from torch._inductor.standalone_compile import CompiledArtifact

    return CompiledArtifact.load(path=str(path), format="binary")


def one_line(error: BaseException) -> str:
    """Return the class and the text of an error in one line of at most ``MAX_REASON_CHARS``."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_REASON_CHARS]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
