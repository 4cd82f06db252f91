"""The command ``xditd``, and ``python -m xditd``: Ctrl-C ends it quietly from the first import on."""

from __future__ import annotations

import sys

from xditd.ipc.interrupted_imports import INTERRUPTED, interrupts_end_process


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        with interrupts_end_process():
            from xditd.client.cli.main import main as run
        return run()
    except KeyboardInterrupt:  # before the command line could handle it
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
