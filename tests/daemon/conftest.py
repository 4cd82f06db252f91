"""Fixtures for the tests of the daemon's modules."""

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
    """Reset the umask, which a runtime folder sets for the whole process, for later tests."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def service() -> Iterator[Service]:
    """A service without sockets, in its own runtime folder."""
    with tempfile.TemporaryDirectory(prefix="xditd-") as name:  # the path of a socket must be short
        configuration = Configuration(runtime_dir=str(Path(name) / "run"))
        with RuntimeFolder(configuration.runtime) as folder:
            service = Service(configuration, folder, {}, LogBuffer(), ServiceManager({}, os.getpid()))
            yield service
            service.close()
