from __future__ import annotations

import pytest

from xditd.daemon.sockets.credentials import check_uid
from xditd.ipc.errors import NotPermitted


def test_own_user_is_admitted() -> None:
    peer = check_uid("localhost:1000:100:4242", 1000)
    assert (peer.uid, peer.gid, peer.pid) == (1000, 100, 4242)


def test_another_user_is_named() -> None:
    with pytest.raises(NotPermitted, match="uid 1001: this daemon serves uid 1000 only"):
        check_uid("localhost:1001:100:4242", 1000)


def test_process_of_another_pid_namespace_is_refused_with_the_remedy() -> None:
    with pytest.raises(NotPermitted, match="--pid=host"):
        check_uid("localhost:1000:100:0", 1000)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "localhost:1:2", "localhost:a:b:c", "localhost:1:2:3:4"])
def test_address_without_credentials_is_refused(address: str) -> None:
    with pytest.raises(NotPermitted, match="has no process id"):
        check_uid(address, 1000)
