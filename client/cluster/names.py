"""Names of the actors of a cluster, and what Ray raises when one is lost."""

from __future__ import annotations

from typing import Final

import ray.exceptions

from xditd.client.cluster.errors import HostLost

NAMESPACE: Final = "xditd"
ROUTER: Final = "router"
HOST_PREFIX: Final = "host:"

LOST: Final = (ray.exceptions.RayError,)
"""What Ray raises when an actor, its host or an object is lost; an agent's own errors are in its answers."""


def host_actor_name(name: str) -> str:
    """Return the name of a host's actor."""
    return HOST_PREFIX + name


def host_resource(name: str) -> str:
    """Return the resource that the host's Ray has, and no other: its actor runs there or nowhere."""
    return f"xditd:{name}"


def host_lost(name: str, error: Exception) -> HostLost:
    """Return the error of a host whose actor raised one of :data:`LOST`."""
    kind = type(error).__name__
    first = (str(error).strip().splitlines() or [""])[0]
    return HostLost(f"host {name}: lost, or the link to it is cut ({kind}: {first:.200})")
