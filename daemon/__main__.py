"""Entry point of the daemon (``python -m xditd.daemon``): Ctrl-C ends it quietly from the first import on."""

from __future__ import annotations

import sys

from xditd.ipc.interrupted_imports import INTERRUPTED, interrupts_end_process


def main() -> int:
    """Run the daemon; returns the exit status."""
    try:
        with interrupts_end_process():
            from xditd.daemon.main import main as run
        return run()
    except KeyboardInterrupt:  # before the daemon handles signals
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
