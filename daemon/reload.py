"""Read the configuration again, and apply what can change while the daemon runs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Final

from xditd.daemon.configuration import Configuration
from xditd.daemon.front.quotas import Quotas
from xditd.daemon.front.service import Service
from xditd.ipc.errors import XditdError

logger = logging.getLogger(__name__)

LIVE: Final = (
    "client_deadline_s",
    "client_io_bytes",
    "client_lent_bytes",
    "client_loan_limit",
    "client_queue_limit",
    "drain_deadline_s",
    "log_level",
    "max_restarts",
    "message_bytes",
    "queue_limit",
)
"""Settings that a reload applies. The others shape sockets and worker processes, and need a restart."""


def reload(service: Service, read: Callable[[], Configuration]) -> str:
    """Apply a new configuration; returns what came of it, for the service manager and the log.

    One that cannot be read changes nothing.
    """
    try:
        new = read()
    except XditdError as error:
        logger.error("configuration not reloaded: %s", error.detail)
        return f"configuration not reloaded: {error.detail}"
    old = service.configuration
    names = [field.name for field in dataclasses.fields(Configuration)]
    changed = [name for name in names if getattr(old, name) != getattr(new, name)]
    service.configuration = dataclasses.replace(old, **{name: getattr(new, name) for name in LIVE})
    service.quotas = Quotas.of(service.configuration)
    service.scheduler.queue.limit = new.queue_limit
    service.scheduler.queue.client_limit = new.client_queue_limit
    service.group.restarts.limit = new.max_restarts
    logging.getLogger().setLevel(new.log_level.upper())
    applied = ", ".join(name for name in changed if name in LIVE) or "nothing"
    waiting = ", ".join(name for name in changed if name not in LIVE) or "nothing"
    outcome = f"configuration reloaded: {applied} changed; {waiting} needs a restart"
    logger.info("%s", outcome)
    return outcome
