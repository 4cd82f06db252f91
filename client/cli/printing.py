"""What goes to the standard streams: JSON that every reader takes, and streams that are closed, full or cut off."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from typing import Any, TextIO

from xditd.ipc.errors import XditdError
from xditd.ipc.inherited import open_streams


class _Stdout(io.TextIOWrapper):
    """Standard output that remembers why it failed: argparse drops such errors, and buffers raise them late."""

    lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.lost = self.lost or error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.lost = self.lost or error
            raise


def json_text(value: Any, indent: int | None = None) -> str:
    """Spell a value as JSON. NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def error_json(error: XditdError) -> dict[str, object]:
    """Spell an error for programs: what went wrong, whether the same may work later, and what was saved."""
    found: dict[str, object] = {"code": error.code, "message": error.detail, "retryable": error.retryable}
    if error.names:
        found["names"] = list(error.names)
    if error.retry_after_s is not None:
        found["retry_after_s"] = error.retry_after_s
    kept = getattr(error, "kept", ())
    if kept:
        found["kept"] = list(kept)
    return {"error": found}


def settle() -> None:
    """Give this process three standard streams that can be used, whatever it was started with.

    Names that the terminal's encoding does not have are escaped.
    """
    is_replaced = sys.stdout is not sys.__stdout__
    open_streams(discard_output=False)  # somebody who asked for data has to be told where it cannot be written
    if is_replaced:
        return  # a program that calls main() has put a stream of its own there
    old = sys.stdout
    assert isinstance(old, io.TextIOWrapper)
    new = _Stdout(
        old.detach(),
        encoding=old.encoding,
        errors="backslashreplace" if old.errors == "strict" else old.errors,
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )
    sys.stdout = sys.__stdout__ = new  # type: ignore[misc]


def say_error(text: str) -> None:
    """Write a line to stderr. Where even that is closed or full, the exit status has to do."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def say_json_error(error: XditdError) -> None:
    """Write an error to stdout as a line of JSON; :func:`finish` tells whether that worked."""
    with contextlib.suppress(OSError, ValueError):
        print(json_text(error_json(error)))


def stdout_loss() -> OSError | None:
    """Why standard output could not be written, if so."""
    return getattr(sys.stdout, "lost", None)


def finish() -> OSError | None:
    """Write out what the streams still hold; returns why standard output could not be written."""
    _flush(sys.stderr)
    return _flush(sys.stdout) or stdout_loss()


def _flush(stream: TextIO) -> OSError | None:
    try:
        stream.flush()
    except OSError as error:
        # What is left goes nowhere: Python would try once more on its way out, and complain.
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)
        with contextlib.suppress(OSError):
            stream.flush()
        return error
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
