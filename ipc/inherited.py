"""What a process inherits from whoever started it, brought into a known state.

Left as they are, because they are the operator's to choose: resource limits, niceness, CPU affinity, control groups.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Final

_STREAMS: Final = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))

_MAY_BE_IGNORED: Final = frozenset(
    {
        signal.SIGHUP,  # by nohup(1)
        signal.SIGINT,  # by a shell, for its background jobs
        signal.SIGQUIT,
        signal.SIGPIPE,  # by Python, which raises BrokenPipeError instead
        signal.SIGXFSZ,  # likewise, OSError
    }
)


def reset_signals() -> None:
    """Block no signal, and ignore none that nobody ignores on purpose.

    With SIGCHLD ignored the kernel throws the exit statuses of children away, and with SIGTERM blocked nothing but
    SIGKILL ends a process (signal(7), wait(2)).
    """
    for number in signal.valid_signals() - _MAY_BE_IGNORED:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def open_streams(*, discard_output: bool = True) -> None:
    """Open the standard streams that were closed, on ``/dev/null``.

    Their numbers would go to the next sockets and files otherwise, and what is printed would be written to those.
    Without ``discard_output``, writing to a standard output that was closed still fails.
    """
    for descriptor, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            access = os.O_RDONLY if name == "stdout" and not discard_output else os.O_RDWR
            os.open(os.devnull, access)  # gets the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, errors="backslashreplace", closefd=False))  # noqa: SIM115 - kept


def current_folder() -> Path | None:
    """The folder from which relative paths count; ``None`` where it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def search_path(value: str, folder: Path | None) -> str:
    """Settle a list of folders such as ``PATH`` for a process that runs in another folder than ``folder``.

    Empty entries and ``.`` mean wherever a process happens to be, with code that nobody chose: they are left out. Other
    relative entries count from ``folder``.
    """
    entries = [entry for entry in value.split(os.pathsep) if os.path.normpath(entry) != "."]
    if folder is None:
        return os.pathsep.join(entry for entry in entries if os.path.isabs(entry))
    return os.pathsep.join(os.path.normpath(folder / entry) for entry in entries)
