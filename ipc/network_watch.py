"""Detect connections of this process to other hosts, as evidence that nothing is downloaded.

Two methods, neither complete alone. A Python audit hook sees every attempt of Python code, but not of C libraries. The
kernel's socket tables show connections of any library, but only those that are open when they are read. Neither counts
bytes: without an attempt there are none.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_EVENTS: Final = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
_INTERNET: Final = frozenset({socket.AF_INET, socket.AF_INET6})
_LISTENING: Final = 0x0A  # TCP_LISTEN in include/net/tcp_states.h


class OutsideConnections:
    """The addresses beyond loopback to which Python code of this process has tried to connect since ``install``.

    Source: Python documentation, "Audit events table".
    """

    def __init__(self) -> None:
        self.attempts: list[str] = []

    @classmethod
    def install(cls) -> OutsideConnections:
        """Install the audit hook. It cannot be removed: install one, early, in each process."""
        watch = cls()
        sys.addaudithook(watch._on_event)
        return watch

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        # Called inside every socket call, which an exception here would break.
        family = getattr(arguments[0], "family", None)
        address = arguments[1]
        if family in _INTERNET and isinstance(address, tuple) and len(address) >= 2 and not is_local(address[0]):
            self.attempts.append(f"{address[0]}:{address[1]}")


def is_local(host: object) -> bool:
    """Return whether a host, as given to ``connect``, is loopback. Of host names, only localhost is."""
    text = host.decode("ascii", "replace") if isinstance(host, (bytes, bytearray)) else str(host)
    if text in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


@dataclass(frozen=True)
class InternetSocket:
    """One TCP or UDP socket that a process holds open."""

    protocol: str
    local: str
    remote: str
    is_listening: bool
    is_outside: bool
    """It listens beyond loopback, or is connected to another host."""


def internet_sockets(pid: int) -> list[InternetSocket]:
    """List the TCP and UDP sockets of a process of the same user; a process that has exited has none.

    Source: proc(5), /proc/pid/net/tcp.
    """
    try:
        links = [_link(pid, name) for name in os.listdir(f"/proc/{pid}/fd")]
        inodes = {int(link[8:-1]) for link in links if link.startswith("socket:[")}
        return [found for found, inode in _rows(pid) if inode in inodes]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _link(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}")
    except FileNotFoundError:  # closed meanwhile
        return ""


def _rows(pid: int) -> Iterator[tuple[InternetSocket, int]]:
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        try:
            with open(f"/proc/{pid}/net/{protocol}") as table:
                lines = table.readlines()[1:]
        except FileNotFoundError:  # a kernel without IPv6
            continue
        for line in lines:
            fields = line.split()
            local_host, local_port = _address(fields[1])
            remote_host, remote_port = _address(fields[2])
            is_listening = protocol.startswith("tcp") and int(fields[3], 16) == _LISTENING
            any_host = ipaddress.ip_address(local_host).is_unspecified
            is_outside = (any_host or not is_local(local_host)) if is_listening else not is_local(remote_host)
            found = InternetSocket(
                protocol=protocol,
                local=f"{local_host}:{local_port}",
                remote=f"{remote_host}:{remote_port}",
                is_listening=is_listening,
                is_outside=is_outside,
            )
            yield found, int(fields[9])


def _address(text: str) -> tuple[str, int]:
    """Parse ``0100007F:1F90``: 32-bit words of the host's byte order, in network order in memory."""
    words, _, port = text.partition(":")
    packed = b"".join(struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8))
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, packed), int(port, 16)
