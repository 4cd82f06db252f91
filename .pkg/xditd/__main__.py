"""``python -m xditd``: the command line, as ``xditd``."""

from __future__ import annotations

import sys

from xditd.client.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
