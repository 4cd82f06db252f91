from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from xditd.daemon.configuration import Configuration
from xditd.daemon.front.service import Service
from xditd.daemon.reload import reload
from xditd.ipc.errors import BadRequest


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


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
