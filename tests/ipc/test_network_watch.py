"""Connections to other hosts are detected, local ones are not."""

import os
import socket
import subprocess
import sys

import pytest

from xditd.ipc.network_watch import internet_sockets, is_local

WATCHES = """
import contextlib, socket, sys, tempfile
from xditd.ipc.network_watch import OutsideConnections
watch = OutsideConnections.install()
{body}
print(*watch.attempts, sep="\\n")
"""


def attempts(body):
    # An audit hook stays for the life of a process, so each test watches one of its own.
    done = subprocess.run([sys.executable, "-c", WATCHES.format(body=body)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_notices_attempts_whatever_becomes_of_them():
    # 192.0.2.0/24 and 2001:db8::/32 are for documentation (RFC 5737, RFC 3849): nobody answers.
    body = """
tcp = socket.socket()
tcp.setblocking(False)
with contextlib.suppress(OSError):
    tcp.connect(("192.0.2.1", 443))
with contextlib.suppress(OSError):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.2", 53))
with contextlib.suppress(OSError):
    socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).connect(("2001:db8::1", 53))
"""
    assert attempts(body) == ["192.0.2.1:443", "192.0.2.2:53", "2001:db8::1:53"]


def test_loopback_and_unix_sockets_are_none_of_its_business():
    body = """
listener = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listener.getsockname())
socket.create_connection(("localhost", listener.getsockname()[1]))
with tempfile.TemporaryDirectory() as folder:
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(folder + "/s")
    unix.listen()
    socket.socket(socket.AF_UNIX).connect(folder + "/s")
"""
    assert attempts(body) == []


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        (b"localhost", True),
        ("0.0.0.0", True),
        ("", True),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("fe80::1%eth0", False),
        ("huggingface.co", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_knows_loopback(host, expected):
    assert is_local(host) is expected


def test_the_kernels_tables_show_listeners_and_whether_they_are_open_to_others():
    with socket.create_server(("127.0.0.1", 0)) as inside, socket.create_server(("0.0.0.0", 0)) as outside:
        found = {each.local: each for each in internet_sockets(os.getpid())}
        assert found[f"127.0.0.1:{inside.getsockname()[1]}"].is_outside is False
        assert found[f"0.0.0.0:{outside.getsockname()[1]}"].is_outside is True
        assert found[f"0.0.0.0:{outside.getsockname()[1]}"].is_listening


def test_a_local_connection_is_not_outside():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        name = "{}:{}".format(*one.getsockname())
        found = [each for each in internet_sockets(os.getpid()) if each.local == name]
    assert [each.is_outside for each in found] == [False]


def test_a_process_that_is_gone_has_no_sockets():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert internet_sockets(process.pid) == []
