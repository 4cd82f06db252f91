"""Other rooms' programs, started by command line: the only way from the client to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

from xditd.ipc.inherited import current_folder, search_path

# Without -P, `python -m` looks for every module in the current folder first, where a file may have any name: queue.py.
# -I would be too much: it drops PYTHONPATH as well. Before 3.11, which brought -P, the folder is removed by hand.
_HAS_SAFE_PATH: Final = sys.version_info >= (3, 11)
_WITHOUT_SAFE_PATH: Final = (
    "import sys; del sys.path[0]; import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_command(module: str, arguments: Sequence[str], *, has_safe_path: bool = _HAS_SAFE_PATH) -> list[str]:
    """Spell the command that runs a module of this installation in this Python, whatever lies in the current folder.

    ``has_safe_path`` says whether this Python knows ``-P``.
    """
    if has_safe_path:
        return [sys.executable, "-P", "-m", module, *arguments]
    return [sys.executable, "-c", _WITHOUT_SAFE_PATH, module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment for :func:`module_command`: this process's, but for what leads to the current folder."""
    environ = dict(os.environ)
    environ.pop("PYTHONINSPECT", None)  # a daemon that has ended would ask for Python statements
    path = search_path(environ.pop("PYTHONPATH", ""), current_folder())
    return {**environ, "PYTHONPATH": path} if path else environ
