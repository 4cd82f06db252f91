"""What the tests of the daemon's modules share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from xditd.daemon.configuration import Configuration
from xditd.daemon.front.service import Service
from xditd.daemon.operations.log_buffer import LogBuffer
from xditd.daemon.operations.runtime_folder import RuntimeFolder
from xditd.daemon.operations.service_manager import ServiceManager


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """A runtime folder sets the mask of the whole process: tests that come later start from a known one."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def service() -> Iterator[Service]:
    """A service that listens nowhere, in a runtime folder of its own."""
    with tempfile.TemporaryDirectory(prefix="xditd-") as name:  # a socket's path may not be long
        configuration = Configuration(runtime_dir=str(Path(name) / "run"))
        with RuntimeFolder(configuration.runtime) as folder:
            service = Service(configuration, folder, {}, LogBuffer(), ServiceManager({}, os.getpid()))
            yield service
            service.close()
