"""Convert errors of the demo's output folder to a typed error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from xditd.ipc.errors import OutputFailed, XditdError


@contextlib.contextmanager
def writing_to(folder: Path, option: str) -> Iterator[None]:
    """Convert an ``OSError`` about files in ``folder`` to ``OutputFailed``; ``option`` is the flag for another folder.

    Raises:
        OutputFailed: a file could not be written; the message names it and the remedy.
    """
    try:
        yield
    except XditdError:
        raise
    except OSError as error:
        raise OutputFailed(
            f"{error.filename or folder}: {error.strerror or error}; make room there (df and df -i show it), "
            f"or choose another folder ({option})"
        ) from error
