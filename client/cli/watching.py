"""Show the state of the daemon again and again, also over its restarts."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Final

from xditd.ipc.errors import Closed, DaemonUnreachable, DeadlineExceeded, XditdError

if TYPE_CHECKING:
    from xditd.client.client import Client
    from xditd.ipc.status import DaemonStatus

_HOME_AND_CLEAR: Final = "\x1b[H\x1b[J"
_CLEAR_ALL: Final = "\x1b[2J"
_NO_ANSWER: Final = (Closed, DaemonUnreachable, DeadlineExceeded)


def watch(runtime_dir: str | None, name: str, every_s: float, show: Callable[[DaemonStatus], str]) -> None:
    """Print what ``show`` makes of the daemon's state every ``every_s`` seconds, until ``KeyboardInterrupt``.

    On a terminal each state takes the place of the one before, and while no daemon answers, the reason stands there.

    Raises:
        DaemonUnreachable, DeadlineExceeded: none answers at the start.
    """
    is_terminal = sys.stdout.isatty()
    begun = False
    with contextlib.closing(_states(runtime_dir, name, every_s)) as states:
        for found in states:
            if isinstance(found, XditdError):
                if not begun:
                    raise found
                text = f"no daemon: {found.detail}" if is_terminal else ""
            else:
                text = show(found)
            if is_terminal:
                print((_HOME_AND_CLEAR if begun else _CLEAR_ALL + _HOME_AND_CLEAR) + text, flush=True)
            elif text:
                print(text, flush=True)
            begun = True


def _states(runtime_dir: str | None, name: str, every_s: float) -> Generator[DaemonStatus | XditdError]:
    from xditd.client.client import Client

    client: Client | None = None
    next_s = time.monotonic()
    try:
        while True:
            try:
                if client is None:
                    client = Client(runtime_dir, name=name)
                yield client.status()
            except _NO_ANSWER as error:
                if client is not None:
                    with contextlib.suppress(*_NO_ANSWER):
                        client.close()
                    client = None
                yield error
            next_s = max(next_s + every_s, time.monotonic())
            time.sleep(max(0.0, next_s - time.monotonic()))
    finally:
        if client is not None:
            client.close()
