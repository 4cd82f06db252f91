"""Print JSON and errors, and handle standard streams that are closed, full or without a reader."""

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
    """Standard output that stores its first error: argparse ignores such errors, and a buffer raises them late."""

    first_error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.first_error = self.first_error or error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.first_error = self.first_error or error
            raise


def json_text(value: Any, indent: int | None = None) -> str:
    """Format a value as JSON. NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def error_json(error: XditdError) -> dict[str, object]:
    """Describe an error for JSON: code, message, whether a retry may work, and files that were saved elsewhere."""
    found: dict[str, object] = {"code": error.code, "message": error.detail, "retryable": error.retryable}
    if error.names:
        found["names"] = list(error.names)
    if error.retry_after_s is not None:
        found["retry_after_s"] = error.retry_after_s
    kept = getattr(error, "kept", ())
    if kept:
        found["kept"] = list(kept)
    return {"error": found}


def prepare_streams() -> None:
    """Open standard streams that the parent process closed, and make stdout an :class:`_Stdout`.

    Characters that the terminal's encoding does not have are escaped.
    """
    is_replaced = sys.stdout is not sys.__stdout__
    open_streams(discard_output=False)  # if data cannot be written, the user must get an error
    if is_replaced:
        return  # a program that calls main() has set its own stream
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


def print_error(text: str) -> None:
    """Write a line to stderr; ignore errors, because the exit status reports the failure too."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def print_json_error(error: XditdError) -> None:
    """Write an error to stdout as a line of JSON; :func:`flush_streams` returns why that failed, if so."""
    with contextlib.suppress(OSError, ValueError):
        print(json_text(error_json(error)))


def stdout_error() -> OSError | None:
    """Return the error of standard output, if any."""
    return getattr(sys.stdout, "first_error", None)


def flush_streams() -> OSError | None:
    """Flush the streams; returns the error of standard output, if any."""
    _flush(sys.stderr)
    return _flush(sys.stdout) or stdout_error()


def _flush(stream: TextIO) -> OSError | None:
    try:
        stream.flush()
    except OSError as error:
        # Discard the rest: Python flushes once more at exit, and would print an error.
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)
        with contextlib.suppress(OSError):
            stream.flush()
        return error
    return None


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return value
