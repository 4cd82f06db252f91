"""Command line and environment for the daemon's and the workers' programs, which the client does not import."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

from xditd.ipc.inherited import current_folder, search_path

_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None)

# Without -P, `python -m` first imports modules from the current folder, where a file may be named queue.py.
# -I also ignores PYTHONPATH. Python before 3.11 has no -P, so there the folder is removed from sys.path.
_HAS_SAFE_PATH: Final = sys.version_info >= (3, 11)
_WITHOUT_SAFE_PATH: Final = (
    "import sys; del sys.path[0]; import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_command(module: str, arguments: Sequence[str], *, has_safe_path: bool = _HAS_SAFE_PATH) -> list[str]:
    """Build the command that runs a module of this installation without importing from the current folder."""
    if has_safe_path:
        return [sys.executable, "-P", "-m", module, *arguments]
    return [sys.executable, "-c", _WITHOUT_SAFE_PATH, module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment for :func:`module_command`: this process's, without the current folder in ``PYTHONPATH``."""
    environ = dict(os.environ)
    environ.pop("PYTHONINSPECT", None)  # it would open a Python prompt when the daemon ends
    path = search_path(environ.pop("PYTHONPATH", ""), current_folder())
    return {**environ, "PYTHONPATH": path} if path else environ


def end_with_parent() -> None:
    """Have this process, a child before exec, get SIGTERM when its parent is killed.

    It is called between fork and exec, so it only calls a function that is there. Source: prctl(2), PR_SET_PDEATHSIG.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
