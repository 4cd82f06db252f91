"""Starting the group's leader when the system does not let us."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xditd.daemon import supervisor
from xditd.daemon.configuration import Configuration
from xditd.daemon.logbook import Logbook
from xditd.daemon.notify import Notifier
from xditd.daemon.runtime_folder import RuntimeFolder
from xditd.daemon.service import Service
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.status import GroupState


@pytest.fixture
def service() -> Iterator[Service]:
    umask = os.umask(0o022)  # which the folder changes for the whole process
    with tempfile.TemporaryDirectory(prefix="xditd-") as name:
        configuration = Configuration(runtime=RuntimeDir(Path(name) / "run"))
        with RuntimeFolder(configuration.runtime) as folder:
            service = Service(configuration, folder, {}, Logbook(), Notifier({}, os.getpid()))
            yield service
            service.close()
    os.umask(umask)


@pytest.mark.parametrize(
    ("number", "state", "says"),
    [
        (errno.EAGAIN, GroupState.DEAD, "Resource temporarily unavailable"),
        (errno.ENOMEM, GroupState.DEAD, "Cannot allocate memory"),
        (errno.EMFILE, GroupState.GIVEN_UP, "ulimit -Hn"),
        (errno.EACCES, GroupState.GIVEN_UP, "correct [workers] command"),
    ],
)
def test_only_what_may_pass_is_tried_again(
    service: Service, monkeypatch: pytest.MonkeyPatch, number: int, state: GroupState, says: str
) -> None:
    """The system's answers are put in place of the real ones: root is not held to limits on processes."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(supervisor, "Leader", refuse)
    service.supervisor.start()
    assert service.supervisor.state is state
    assert says in service.supervisor.detail
