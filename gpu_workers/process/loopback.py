"""Check of the loopback interface, the only one that the ranks of a group use."""

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
    """Check that the interface is up; in a new network namespace it is down at first.

    Raises:
        Unsupported: it is down or missing. gloo's own error would not say so.

    Source: netdevice(7), SIOCGIFFLAGS.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFFLAGS, _REQUEST.pack(LOOPBACK.encode(), 0))
        except OSError as error:
            raise Unsupported(
                f"network interface {LOOPBACK}: {error.strerror}; the workers connect on it alone"
            ) from error
    if not _REQUEST.unpack(answer)[1] & _IFF_UP:
        raise Unsupported(
            f"network interface {LOOPBACK}: it is down, and the workers connect on it alone; bring it up "
            f"(ip link set {LOOPBACK} up), then restart the daemon"
        )
