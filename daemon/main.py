"""The daemon's program: parse, configure logging, build, run, close."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from xditd.daemon.arguments import build_parser
from xditd.daemon.configuration import Configuration, build_configuration
from xditd.daemon.front.dispatch import Dispatcher
from xditd.daemon.front.handlers.status import describe_daemon
from xditd.daemon.front.service import Service
from xditd.daemon.groups.worker_environment import worker_environment
from xditd.daemon.operations.log_buffer import LogBuffer, configure_logging
from xditd.daemon.operations.metrics_server import MetricsServer, listen_on_loopback
from xditd.daemon.operations.process_setup import adopt_orphans, raise_limit
from xditd.daemon.operations.runtime_folder import RuntimeFolder
from xditd.daemon.operations.service_manager import ServiceManager, service_manager_of_this_process
from xditd.daemon.operations.signals import Signals
from xditd.daemon.operations.socket_activation import take_listener
from xditd.daemon.reload import reload
from xditd.ipc.addresses import METRICS_OFF, parse_metrics_address
from xditd.ipc.command_line import unknown_variables
from xditd.ipc.errors import XditdError
from xditd.ipc.inherited import current_folder, open_streams, reset_signals
from xditd.ipc.open_files import describe_limit, is_want_of_descriptors

logger = logging.getLogger("xditd.daemon")

STOPPED, FAILED, MISUSED = 0, 1, 2

WORKING_FOLDER: Final = "/"
"""Of the daemon and its workers. A user may remove the folder in which the daemon was started; torch does not load in a
removed one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon until it is told to stop; returns the exit status."""
    reset_signals()
    open_streams()
    flags = vars(build_parser().parse_args(arguments))
    folder = current_folder()
    try:
        configuration = build_configuration(flags, os.environ, folder)
        configuration.runtime.check_socket_paths()
        service_manager = service_manager_of_this_process()
        listener = take_listener(os.environ, os.getpid(), configuration.runtime.client_socket)
    except XditdError as error:
        print(f"xditd serve: {error.detail}", file=sys.stderr)
        return MISUSED
    environment = worker_environment(os.environ, folder)
    os.chdir(WORKING_FOLDER)
    log_buffer = configure_logging(configuration.log_level)
    for warning in unknown_variables(os.environ):
        logger.warning("%s", warning)
    try:
        read_again = partial(build_configuration, flags, os.environ, folder)
        serve(configuration, environment, log_buffer, service_manager, listener, read_again)
    except XditdError as error:
        logger.error("%s: %s", error.code, error.detail)
        return FAILED
    except Exception as error:
        if is_want_of_descriptors(error):
            logger.error("%s", describe_limit())
            return FAILED
        logger.exception("the daemon ends because of a bug in xditd; please report it with this log")
        return FAILED
    return STOPPED


def serve(
    configuration: Configuration,
    environment: Mapping[str, str],
    log_buffer: LogBuffer,
    service_manager: ServiceManager,
    listener: socket.socket | None,
    read_again: Callable[[], Configuration],
) -> None:
    """Lock the runtime folder and serve clients until stopped; ``listener`` is the service manager's socket, if any."""
    with RuntimeFolder(configuration.runtime) as folder:
        adopt_orphans()
        raise_limit()
        service = Service(configuration, folder, environment, log_buffer, service_manager)
        Dispatcher(service)
        reload_again = partial(service_manager.reload, partial(reload, service, read_again))
        Signals(service.loop, service.stop, service.group.kill, reload_again if service_manager.is_enabled else None)
        metrics: MetricsServer | None = None
        try:
            service.listen(listener)
            metrics = _serve_metrics(service, folder)
            logger.info("daemon listening pid=%d socket=%s", os.getpid(), folder.runtime.client_socket)
            service.run()
        finally:
            if metrics is not None:
                metrics.close()
            service.close()
            service_manager.close()
        if service.failure is not None:
            raise service.failure
        logger.info("daemon stopped")


def _serve_metrics(service: Service, folder: RuntimeFolder) -> MetricsServer | None:
    address = parse_metrics_address(service.configuration.metrics)
    if address == METRICS_OFF:
        return None
    # Imported here: most daemons serve no metrics, and start-up time is counted.
    from xditd.daemon.operations.metrics import write_metrics

    def write() -> str:
        return write_metrics(describe_daemon(service), service.counters, service.group.restarts.failures)

    server = MetricsServer(service.loop, write)
    if isinstance(address, str):
        folder.listen(folder.runtime.metrics_socket, server.listen)
    else:
        server.listen(listen_on_loopback(address))
    logger.info("metrics served at=%s", server.address)
    return server
