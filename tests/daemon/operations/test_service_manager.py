from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Iterator

import pytest

from xditd.daemon.operations.event_loop import EventLoop
from xditd.daemon.operations.service_manager import OVERDUE_GRACE_S, ServiceManager
from xditd.ipc.errors import BadRequest


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, str]]:
    """An address that a service manager binds, and its text in NOTIFY_SOCKET."""
    with (
        tempfile.TemporaryDirectory(prefix="xditd-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound,
    ):
        name = f"{folder}/notify" if request.param == "path" else f"@xditd-test-{os.getpid()}"
        bound.bind(name.replace("@", "\0", 1))
        bound.settimeout(60)
        yield bound, name


def test_words_of_the_protocol(manager: tuple[socket.socket, str]) -> None:
    bound, name = manager
    notifier = ServiceManager({"NOTIFY_SOCKET": name}, pid=1)
    notifier.ready("2 workers\nREADY=0")
    assert bound.recv(4096) == b"READY=1\nSTATUS=2 workers READY=0"
    notifier.alive()
    assert bound.recv(4096) == b"WATCHDOG=1"
    notifier.reloading()
    assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=[1-9]\d+", bound.recv(4096))
    notifier.stopping("bye")
    assert bound.recv(4096) == b"STOPPING=1\nSTATUS=bye"
    notifier.close()
    notifier.alive()  # no service manager


def test_manager_that_is_gone_or_does_not_read_is_not_waited_for() -> None:
    name = tempfile.mktemp(prefix="xditd-")
    notifier = ServiceManager({"NOTIFY_SOCKET": name}, pid=1)
    notifier.alive()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(name)
        for _ in range(2000):  # more than a queue of datagrams holds
            notifier.alive()
    os.unlink(name)
    notifier.close()


def test_without_a_manager_nothing_is_said() -> None:
    notifier = ServiceManager({"WATCHDOG_USEC": "1000000"}, pid=1)
    notifier.ready("x")
    assert not notifier.is_enabled
    assert notifier.watchdog_s == 0


@pytest.mark.parametrize(
    ("variables", "expected_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, 0.0),
        ({}, 0.0),
    ],
)
def test_watchdog_is_for_the_process_that_is_meant(variables: dict[str, str], expected_s: float) -> None:
    assert ServiceManager({"NOTIFY_SOCKET": "@x", **variables}, pid=7).watchdog_s == expected_s


@pytest.mark.parametrize("variables", [{"NOTIFY_SOCKET": "relative"}, {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "soon"}])
def test_variables_that_make_no_sense_are_refused(variables: dict[str, str]) -> None:
    with pytest.raises(BadRequest, match="unset it"):
        ServiceManager(variables, pid=7)


def heard(bound: socket.socket, overdue_s: float, messages: int) -> list[bytes]:
    """Run a loop with a watchdog until so many messages were received, or for half a second."""
    loop = EventLoop()
    found: list[bytes] = []
    bound.setblocking(False)

    def hear() -> None:
        found.append(bound.recv(4096))
        if len(found) == messages:
            loop.stop()

    notifier = ServiceManager({"NOTIFY_SOCKET": "@" + bound.getsockname()[1:].decode(), "WATCHDOG_USEC": "40000"}, 1)
    loop.watch(bound.fileno(), hear)
    notifier.begin(loop, "up", lambda: overdue_s)
    loop.call_later(0.5, loop.stop)
    loop.run(lambda: None)
    notifier.close()
    loop.close()
    return found


def test_loop_keeps_the_watchdog_informed() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(f"\0xditd-fed-{os.getpid()}")
        found = heard(bound, 0.0, 4)
    assert found.count(b"WATCHDOG=1") == 3
    assert b"READY=1\nSTATUS=up" in found


def test_group_long_overdue_withholds_the_keep_alive() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(f"\0xditd-starved-{os.getpid()}")
        found = heard(bound, OVERDUE_GRACE_S + 1, 4)
    assert found == [b"READY=1\nSTATUS=up"]
