"""``python -m xditd.daemon``: parse, configure logging, build, run, close."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from xditd.daemon.arguments import build_parser
from xditd.daemon.configuration import Configuration, build_configuration
from xditd.daemon.dispatch import Dispatcher
from xditd.daemon.leader import adopt_orphans
from xditd.daemon.logbook import Logbook, configure_logging
from xditd.daemon.runtime_folder import RuntimeFolder
from xditd.daemon.service import Service
from xditd.daemon.signals import StopSignals
from xditd.daemon.worker_environment import worker_environment
from xditd.ipc.errors import XditdError

logger = logging.getLogger("xditd.daemon")

STOPPED, FAILED, MISUSED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon until it is told to stop; returns the exit status."""
    flags = vars(build_parser().parse_args(arguments))
    try:
        configuration = build_configuration(flags, os.environ)
    except XditdError as error:
        print(f"xditd serve: {error.detail}", file=sys.stderr)
        return MISUSED
    logbook = configure_logging(configuration.log_level)
    try:
        serve(configuration, logbook, lambda: build_configuration(flags, os.environ))
    except XditdError as error:
        logger.error("%s: %s", error.code, error.detail)
        return FAILED
    except Exception:
        logger.exception("a defect ends the daemon; please report it with this log")
        return FAILED
    return STOPPED


def serve(configuration: Configuration, logbook: Logbook, reread: Callable[[], Configuration]) -> None:
    """Hold the runtime folder and serve from it; ``reread`` builds the configuration anew for a reload."""
    with RuntimeFolder(configuration.runtime) as folder:
        adopt_orphans()
        service = Service(configuration, folder, worker_environment(os.environ), logbook)
        service.reread = reread
        Dispatcher(service)
        StopSignals(service)
        logger.info("daemon listening pid=%d socket=%s", os.getpid(), folder.runtime.client_socket)
        try:
            service.run()
        finally:
            service.close()
        logger.info("daemon stopped")


if __name__ == "__main__":
    sys.exit(main())
