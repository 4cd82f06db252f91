"""The demo's folder, which may be full, read-only or somebody else's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from xditd.ipc.errors import OutputFailed, XditdError


@contextlib.contextmanager
def writing_to(folder: Path, option: str) -> Iterator[None]:
    """Turn what the operating system says about files below ``folder`` into a typed error; ``option`` chooses another.

    Raises:
        OutputFailed: something could not be written; the message names the place and the remedy.
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
