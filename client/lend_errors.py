"""Errors of a lend name the path that was given, not the label of the component that would have been."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xditd.ipc.errors import RequestError


@contextmanager
def naming_path(source: object, label: str | None) -> Iterator[None]:
    """Put the path in place of the label at the beginning of an error, if ``source`` is a path.

    The label is ``label``, or the path's own name as lends make it.
    """
    try:
        yield
    except RequestError as error:
        if not isinstance(source, str | os.PathLike):
            raise
        given = os.fspath(source)
        label = next((each for each in _labels(given, label) if error.detail.startswith(f"{each}: ")), None)
        if label is None:
            raise
        found = type(error)(f"{given}{error.detail[len(label) :]}", names=error.names)
        found.retry_after_s = error.retry_after_s
        raise found from error


def _labels(path: str, label: object) -> Iterator[str]:
    """Yield the labels that a component of this path may have: that which was given, or the path's own name."""
    if isinstance(label, str) and label:
        yield label
        return
    yield from (Path(path).stem, Path(path).name)
    with suppress(ValueError):  # no name of a file, such as half a character
        real = Path(os.path.realpath(path))
        yield from (real.name, real.parent.name)
