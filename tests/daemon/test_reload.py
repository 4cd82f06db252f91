from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from msgspec.structs import replace

from xditd.daemon.configuration import Configuration
from xditd.daemon.front.service import Service
from xditd.daemon.reload import LIVE, reload
from xditd.ipc.errors import BadRequest

IN_USE: Final[dict[str, Callable[[Service], object]]] = {
    "log_level": lambda _: logging.getLevelName(logging.getLogger().level).lower(),
    "queue_limit": lambda service: service.scheduler.queue.limit,
    "client_queue_limit": lambda service: service.scheduler.queue.client_limit,
    "client_loan_limit": lambda service: service.quotas.loans,
    "client_lent_bytes": lambda service: service.quotas.lent_bytes,
    "client_io_bytes": lambda service: service.quotas.io_bytes,
    "message_bytes": lambda service: service.quotas.message_bytes,
    "client_deadline_s": lambda service: service.configuration.client_deadline_s,
    "drain_deadline_s": lambda service: service.configuration.drain_deadline_s,
    "max_restarts": lambda service: service.group.restarts.limit,
}
"""Where the daemon reads each setting that a reload applies: a new one needs its line here and in ``reload``."""


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def test_reload_changes_what_the_daemon_uses(service: Service) -> None:
    assert set(IN_USE) == set(LIVE)
    other = {name: getattr(service.configuration, name) for name in LIVE}
    other = {name: "debug" if name == "log_level" else value + 1 for name, value in other.items()}
    reload(service, lambda: replace(service.configuration, **other))
    assert {name: read(service) for name, read in IN_USE.items()} == other


def test_reload_takes_over_limits_and_log_level(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    fresh = replace(
        service.configuration, queue_limit=7, client_queue_limit=3, client_loan_limit=2, log_level="debug", workers=4
    )
    outcome = reload(service, lambda: fresh)
    assert (service.scheduler.queue.limit, service.scheduler.queue.client_limit) == (7, 3)
    assert service.quotas.loans == 2
    assert logging.getLogger().level == logging.DEBUG
    assert service.configuration.workers == "auto"
    assert outcome.endswith("workers needs a restart")
    assert outcome in caplog.text


def test_reload_of_what_cannot_be_read_changes_nothing(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Configuration:
        raise BadRequest("file x: not TOML")

    before = service.configuration
    reload(service, fails)
    assert service.configuration is before
    assert "configuration not reloaded: file x: not TOML" in caplog.text
