"""What must hold before a host joins a cluster: Ray's peers run code on each other, so strangers must be kept out."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from xditd.client.cluster.errors import ClusterUnreachable
from xditd.ipc.errors import BadRequest, NotPermitted

WARNING: Final = (
    "whoever holds the token of this Ray cluster can run any code as this user on every host of it, and Ray listens on "
    "the network"
)
_TLS_FILES: Final = {
    "RAY_TLS_SERVER_CERT": "this host's certificate",
    "RAY_TLS_SERVER_KEY": "its key",
    "RAY_TLS_CA_CERT": "the certificate of the authority that signed every host's",
}
_MIN_TOKEN_CHARS: Final = 32

RAY_SETTINGS: Final = {
    # Ray's defaults notice a cut link after about a minute; these after three failed checks, a second apart.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "2000",
    "RAY_grpc_client_keepalive_timeout_ms": "2000",
    "RAY_grpc_keepalive_time_ms": "2000",
    "RAY_grpc_keepalive_timeout_ms": "2000",
    # How long hosts wait for a head that is gone before they start over.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    # By default Ray gives its actors niceness 15: on a busy host the router and the agent would wait for all others.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of every process of the cluster that this host starts, unless the user has set another value."""


def tuned(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the variables of :data:`RAY_SETTINGS`."""
    return {**RAY_SETTINGS, **environ}


def split_address(address: str) -> tuple[str, int]:
    """Split ``IP:PORT``, with brackets around an IPv6 address.

    Raises:
        BadRequest: no such address. Names are refused, as they may resolve to other hosts later.
    """
    host, _, port = (address if isinstance(address, str) else "").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
        if not (port.isdecimal() and 0 < int(port) <= 65_535):
            raise ValueError(port)
    except ValueError:
        raise BadRequest(
            f"address {address!r:.100}: give the head's IP address and port, such as 10.0.0.1:6379"
        ) from None
    return host, int(port)


def own_address(address: str) -> str:
    """Return this host's own address towards the head's; no packet is sent.

    Raises:
        BadRequest: no address.
        ClusterUnreachable: there is no route to it.
    """
    head = split_address(address)
    with socket.socket(socket.AF_INET6 if ":" in head[0] else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(head)
        except OSError as error:
            raise ClusterUnreachable(f"address {address}: {error.strerror}; is the network up?") from error
        return str(probe.getsockname()[0])


def check_access(environ: Mapping[str, str], addresses: Iterator[str] | list[str]) -> None:
    """Refuse an environment in which a stranger could join: no token, or no TLS beyond loopback.

    ``addresses`` are those of the head and of this host.

    Raises:
        NotPermitted: what is missing, and how to add it.
    """
    faults = list(faults_of_access(environ, list(addresses)))
    if faults:
        raise NotPermitted("; ".join(faults), names=faults)


def faults_of_access(environ: Mapping[str, str], addresses: list[str]) -> Iterator[str]:
    """Name each fault, with its remedy."""
    if environ.get("RAY_AUTH_MODE") != "token":
        yield "RAY_AUTH_MODE: not 'token', so that anyone who reaches Ray's ports could run code here; set it to token"
    else:
        yield from _token_faults(environ)
    outside = [each for each in addresses if not ipaddress.ip_address(each).is_loopback]
    if outside:
        yield from _tls_faults(environ, outside[0])


def _token_faults(environ: Mapping[str, str]) -> Iterator[str]:
    token = environ.get("RAY_AUTH_TOKEN", "")
    where = "RAY_AUTH_TOKEN"
    if not token:
        path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
        where = str(path)
        remedy = f"write a random token there (openssl rand -hex 32), mode 0600, the same on every host: {path}"
        try:
            found = path.stat()
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            yield f"token {path}: {getattr(error, 'strerror', None) or error}; {remedy}"
            return
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or found.st_uid != os.getuid():
            yield f"token {path}: others may read it; chmod 600, and let this user own it"
    if len(token) < _MIN_TOKEN_CHARS:
        yield f"token {where}: {len(token)} characters, which can be guessed; make one by openssl rand -hex 32"


def _tls_faults(environ: Mapping[str, str], address: str) -> Iterator[str]:
    if environ.get("RAY_USE_TLS") != "1":
        yield (
            f"RAY_USE_TLS: not 1, but {address} is not loopback, and without TLS the token crosses the network in the "
            "clear; set it, and " + ", ".join(_TLS_FILES)
        )
        return
    for variable, what in _TLS_FILES.items():
        path = environ.get(variable, "")
        if not path or not os.access(path, os.R_OK):
            yield f"{variable}: {path or 'not set'}; name a readable file with {what}"
        elif variable.endswith("_KEY") and os.stat(path).st_mode & 0o077:
            yield f"{variable}: {path}: others may read it; chmod 600"
