"""The loopback interface, on which alone the ranks of a group meet."""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Final

from xditd.ipc.errors import Unsupported

LOOPBACK: Final = "lo"
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 1
_REQUEST: Final = struct.Struct("16sH14x")


def check_loopback() -> None:
    """See that the interface is up; in a network namespace of one's own it is not, until somebody sees to it.

    Raises:
        Unsupported: it is down, or not there. gloo would give an error that names neither.

    Source: netdevice(7), SIOCGIFFLAGS.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFFLAGS, _REQUEST.pack(LOOPBACK.encode(), 0))
        except OSError as error:
            raise Unsupported(
                f"network interface {LOOPBACK}: {error.strerror}; the workers meet on it alone"
            ) from error
    if not _REQUEST.unpack(answer)[1] & _IFF_UP:
        raise Unsupported(
            f"network interface {LOOPBACK}: it is down, and the workers meet on it alone; bring it up "
            f"(ip link set {LOOPBACK} up), then restart the daemon"
        )
