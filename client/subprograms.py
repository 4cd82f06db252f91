"""Other rooms' programs, started by command line: the only way from the client to them."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def module_command(module: str, arguments: Sequence[str]) -> list[str]:
    """Spell the command that runs a module of this installation in this Python."""
    # Without -P, `python -m` would look for every module in the current folder first.
    isolation = ["-P"] if sys.version_info >= (3, 11) else []
    return [sys.executable, *isolation, "-m", module, *arguments]
