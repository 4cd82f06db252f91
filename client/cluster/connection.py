"""A process's connection to the cluster: Ray's driver, and the router behind it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Final

import ray

from xditd.client.cluster import security
from xditd.client.cluster.errors import ClusterUnreachable
from xditd.client.cluster.messages import (
    Done,
    HostReport,
    Job,
    Outcome,
    Refused,
    StoredTensors,
    Versions,
    check_versions,
    decode,
    encode,
)
from xditd.client.cluster.names import LOST, NAMESPACE, ROUTER, host_actor_name
from xditd.ipc.errors import BadRequest, NotPermitted, ProtocolMismatch

_ROUTER_DEADLINE_S: Final = 30.0
"""How long a router that is gone is waited for: Ray restarts it within seconds, also after its head's restart."""

_RETRY_S: Final = 0.2
_LEAVE_DEADLINE_S: Final = 20.0
_MAX_SENDS: Final = 20
"""How often a job is sent while routers, or hosts with its result, are lost."""

_router: Any = None
"""The router that answered last; ``None`` after it was lost."""


def connect(address: str) -> None:
    """Connect this process to the Ray of this host, which is part of the cluster at ``address``, its head's.

    Raises:
        ClusterUnreachable: no cluster answers there, or this host has not joined it.
        NotPermitted: the token is missing or wrong, or TLS is off.
        ProtocolMismatch: the cluster runs another version of Ray or Python.
    """
    host, _ = security.split_address(address)
    node_ip = security.own_address(address)
    security.check_access(os.environ, [host, node_ip])
    os.environ.update(security.tuned(os.environ))
    if not ray.is_initialized():
        _forget(_router)
    try:
        ray.init(
            address=address,
            _node_ip_address=node_ip,
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
            logging_level=40,
            ignore_reinit_error=True,
        )
    except Exception as error:  # noqa: BLE001 - Ray raises many classes here, RuntimeError for most
        text = " ".join(str(error).split())
        if "version mismatch" in text.lower():
            raise ProtocolMismatch(f"cluster {address}: {text:.500}; install the same xditd on every host") from None
        if any(word in text.lower() for word in ("unauthenticated", "authentication", "invalidauthtoken", "token")):
            raise NotPermitted(
                f"cluster {address}: the token is not the cluster's: {text:.300}; copy the head's token to this host"
            ) from None
        raise ClusterUnreachable(
            f"cluster {address}: {text:.300}; run `xditd cluster join` on this host, see that the head runs, and "
            "that both have the same token (Ray logs Unauthenticated if not)"
        ) from None


def router(deadline_s: float = _ROUTER_DEADLINE_S) -> Any:
    """Return the router of the connected cluster, of the same versions as this process; asked once until it is lost.

    Raises:
        ClusterUnreachable: there is none within ``deadline_s``.
        ProtocolMismatch: it has other versions.
    """
    global _router
    ends_s = time.monotonic() + deadline_s
    while (known := _router) is None:
        try:
            found = ray.get_actor(ROUTER, namespace=NAMESPACE)
            versions = decode(ray.get(found.versions.remote(), timeout=deadline_s), Versions)
        except (ValueError, *LOST) as error:
            if time.monotonic() > ends_s:
                raise ClusterUnreachable(
                    f"the cluster's router does not answer ({type(error).__name__}); see the log of the head's join"
                ) from None
            time.sleep(_RETRY_S)  # Ray restarts it
        else:
            check_versions(versions, "the cluster's router")
            _router = found
    return known


def _forget(lost: Any) -> None:
    global _router
    if _router is lost:
        _router = None


def submit(job: Job, tensors: StoredTensors) -> tuple[Done, StoredTensors]:
    """Run a job on the cluster, and wait for its end. A router that is lost meanwhile gets the same job again.

    So does the router if the result is lost with the host that made it: the job runs again, with the same seed.

    Raises:
        ClusterUnreachable: no router answers.
        XditdError: the error that ended the job.
    """
    reference = ray.put(encode(tensors))
    lost: Exception | None = None
    for _ in range(_MAX_SENDS):
        actor = router()
        try:
            data, found = ray.get(actor.run.remote(encode(job), [reference]))
            outcome: Outcome = decode(data, Outcome)  # type: ignore[arg-type]
            if isinstance(outcome, Refused):
                raise outcome.error()
            return outcome, decode(ray.get(found[0]), StoredTensors)
        except LOST as error:
            lost = error
            _forget(actor)
            time.sleep(_RETRY_S)  # Ray restarts it
    raise ClusterUnreachable(f"job {job.job_id}: sent {_MAX_SENDS} times, and the router was lost each time: {lost}")


def status() -> dict[str, HostReport | Refused]:
    """Return each host's report, or why it has none.

    Raises:
        ClusterUnreachable: no router answers.
    """
    entry: Any = HostReport | Refused
    ends_s = time.monotonic() + _ROUTER_DEADLINE_S
    while True:
        actor = router()
        try:
            found: dict[str, bytes] = ray.get(actor.status.remote(), timeout=_ROUTER_DEADLINE_S)
        except LOST as error:
            _forget(actor)
            if time.monotonic() > ends_s:
                raise ClusterUnreachable(f"the cluster's router does not answer: {error}") from None
            time.sleep(_RETRY_S)
        else:
            return {name: decode(data, entry) for name, data in sorted(found.items())}


def leave(name: str) -> None:
    """Take a host out of the cluster. Its agent revokes what was lent for the cluster, if it still answers.

    Raises:
        BadRequest: no host of this name has joined.
    """
    try:
        actor = ray.get_actor(host_actor_name(name), namespace=NAMESPACE)
    except ValueError:
        raise BadRequest(f"host {name!r}: has not joined; `xditd cluster status` lists the hosts") from None
    with contextlib.suppress(*LOST):  # a lost host is removed, too
        ray.get(actor.leave.remote(), timeout=_LEAVE_DEADLINE_S)
    ray.kill(actor, no_restart=True)
