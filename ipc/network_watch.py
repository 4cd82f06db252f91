"""Noticing connections to other hosts, so that "nothing was downloaded" is observed and not assumed."""

from __future__ import annotations

import ipaddress
import sys
from typing import Any


class OutsideConnections:
    """Connections that this process's Python code tried to open to other hosts.

    Sees every ``socket.connect`` of Python code (urllib, requests, httpx), refused or not; extension
    modules that make system calls themselves stay unseen, which is why workers also run with the hubs'
    offline switches on.

    Source: Python documentation, "Audit events table", ``socket.connect``.
    """

    def __init__(self) -> None:
        self.attempts: list[str] = []

    @classmethod
    def install(cls) -> OutsideConnections:
        """Start watching. An audit hook stays until the process ends."""
        watch = cls()
        sys.addaudithook(watch._notice)
        return watch

    def _notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "socket.connect":
            return
        address = arguments[1]
        if isinstance(address, tuple) and address and not _is_loopback(str(address[0])):
            self.attempts.append(str(address[0]))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
