"""Reload the configuration: read it again and apply the settings that can change while the daemon runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import msgspec

from xditd.daemon.configuration import Configuration
from xditd.daemon.front.quotas import Quotas
from xditd.daemon.front.service import Service
from xditd.ipc.errors import XditdError
from xditd.ipc.settings.daemon import SETTINGS

logger = logging.getLogger(__name__)

LIVE: Final = tuple(setting.name for setting in SETTINGS if setting.is_reloaded)
"""Settings that a reload applies. The others define sockets and worker processes, and need a restart."""


def reload(service: Service, read: Callable[[], Configuration]) -> str:
    """Apply a new configuration; returns a summary for the service manager. An invalid one changes nothing."""
    try:
        new = read()
    except XditdError as error:
        logger.error("configuration not reloaded: %s", error.detail)
        return f"configuration not reloaded: {error.detail}"
    old = service.configuration
    changed = [each.name for each in SETTINGS if getattr(old, each.name) != getattr(new, each.name)]
    service.configuration = msgspec.structs.replace(old, **{name: getattr(new, name) for name in LIVE})
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
