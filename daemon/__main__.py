"""``python -m xditd.daemon``: parse, configure logging, build, run, close."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from xditd.daemon.activation import take_listener
from xditd.daemon.arguments import build_parser
from xditd.daemon.configuration import Configuration, build_configuration
from xditd.daemon.dispatch import Dispatcher
from xditd.daemon.leader import adopt_orphans
from xditd.daemon.logbook import Logbook, configure_logging
from xditd.daemon.metrics import write_metrics
from xditd.daemon.metrics_server import OFF, MetricsServer
from xditd.daemon.notify import Notifier, notifier_of_this_process
from xditd.daemon.open_files import raise_limit
from xditd.daemon.reload import reload
from xditd.daemon.runtime_folder import RuntimeFolder
from xditd.daemon.service import Service
from xditd.daemon.signals import Signals
from xditd.daemon.worker_environment import worker_environment
from xditd.ipc.command_line import unknown_variables
from xditd.ipc.errors import XditdError

logger = logging.getLogger("xditd.daemon")

STOPPED, FAILED, MISUSED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon until it is told to stop; returns the exit status."""
    flags = vars(build_parser().parse_args(arguments))
    try:
        configuration = build_configuration(flags, os.environ)
        notifier = notifier_of_this_process()
        listener = take_listener(os.environ, os.getpid(), configuration.runtime.client_socket)
    except XditdError as error:
        print(f"xditd serve: {error.detail}", file=sys.stderr)
        return MISUSED
    logbook = configure_logging(configuration.log_level)
    for warning in unknown_variables(os.environ):
        logger.warning("%s", warning)
    try:
        serve(configuration, logbook, notifier, listener, lambda: build_configuration(flags, os.environ))
    except XditdError as error:
        logger.error("%s: %s", error.code, error.detail)
        return FAILED
    except Exception:
        logger.exception("a defect ends the daemon; please report it with this log")
        return FAILED
    return STOPPED


def serve(
    configuration: Configuration,
    logbook: Logbook,
    notifier: Notifier,
    listener: int | None,
    read_again: Callable[[], Configuration],
) -> None:
    """Hold the runtime folder and serve from it, on the socket ``listener`` where a service manager made one."""
    with RuntimeFolder(configuration.runtime, keeps_client_socket=listener is not None) as folder:
        adopt_orphans()
        raise_limit()
        service = Service(configuration, folder, worker_environment(os.environ), logbook, notifier, listener)
        Dispatcher(service)
        is_managed = notifier.is_enabled
        Signals(service, (lambda: service.vitals.reload(lambda: reload(service, read_again))) if is_managed else None)
        metrics: MetricsServer | None = None
        try:
            metrics = _serve_metrics(service)
            logger.info("daemon listening pid=%d socket=%s", os.getpid(), folder.runtime.client_socket)
            service.run()
        finally:
            if metrics is not None:
                metrics.close()
            service.close()
            notifier.close()
        logger.info("daemon stopped")


def _serve_metrics(service: Service) -> MetricsServer | None:
    setting, runtime = service.configuration.metrics, service.configuration.runtime
    if setting == OFF:
        return None
    server = MetricsServer(service.loop, setting, runtime.metrics_socket, lambda: write_metrics(service))
    logger.info("metrics served at=%s", server.address)
    return server


if __name__ == "__main__":
    sys.exit(main())
