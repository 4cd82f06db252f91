"""Entry point of a worker group's leader. The daemon runs it; people run ``xditd serve``."""

from __future__ import annotations

import logging
import sys

from xditd.gpu_workers.leader import lead
from xditd.gpu_workers.options import parse
from xditd.ipc.errors import RequestError

CONFIGURATION_ERROR = 2
"""Exit status that tells the daemon not to try again; the reason is the last line on stderr."""


def main() -> int:
    options = parse(sys.argv[1:])
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s leader %(name)s: %(message)s")
    try:
        return lead(options)
    except RequestError as error:
        print(f"worker group: {error.detail}", file=sys.stderr, flush=True)
        return CONFIGURATION_ERROR


if __name__ == "__main__":
    sys.exit(main())
