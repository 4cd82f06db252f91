"""Reset what a process inherits from its parent: signal handling, standard streams, the current folder, search paths.

Resource limits, niceness, CPU affinity and control groups are left as they are: the operator chooses them.
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
    """Unblock all signals, and restore the default of ignored ones, but for those that are ignored on purpose.

    With SIGCHLD ignored the kernel discards the exit statuses of children, and with SIGTERM blocked only SIGKILL ends
    a process (signal(7), wait(2)).
    """
    for number in signal.valid_signals() - _MAY_BE_IGNORED:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def open_streams(*, discard_output: bool = True) -> None:
    """Open closed standard streams on ``/dev/null``.

    Otherwise the next sockets and files would get their descriptor numbers, and printed text would be written to those.
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
    """Return the current folder; ``None`` if it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def search_path(value: str, folder: Path | None) -> str:
    """Make the entries of a search path such as ``PATH`` absolute, relative to ``folder``.

    Empty entries and ``.`` are left out: they mean the current folder of the process, which may hold foreign code.
    """
    entries = [entry for entry in value.split(os.pathsep) if os.path.normpath(entry) != "."]
    if folder is None:
        return os.pathsep.join(entry for entry in entries if os.path.isabs(entry))
    return os.pathsep.join(os.path.normpath(folder / entry) for entry in entries)
