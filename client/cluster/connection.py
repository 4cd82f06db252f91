"""A process's connection to the cluster: Ray's driver, and the router behind it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pickle import PickleBuffer
from typing import Any, Final, TypeVar

import ray

from xditd.client.cluster import security
from xditd.client.cluster.errors import ClusterUnreachable, HostLost
from xditd.client.cluster.messages import (
    Done,
    HostReport,
    Job,
    Outcome,
    Placed,
    Placement,
    Refused,
    StoredTensors,
    Versions,
    check_versions,
    decode,
    encode,
)
from xditd.client.cluster.names import LOST, NAMESPACE, ROUTER, host_actor_name, host_lost
from xditd.client.cluster.runs import FreeHosts, run_job
from xditd.ipc.errors import BadRequest, NotPermitted, ProtocolMismatch

_ROUTER_DEADLINE_S: Final = 30.0
"""How long a router that is gone is waited for: Ray restarts it within seconds, also after its head's restart."""

_RETRY_S: Final = 0.2
_LEAVE_DEADLINE_S: Final = 20.0

_router: Any = None
"""The router that answered last; ``None`` after it was lost."""

_agents: dict[str, tuple[str, Any]] = {}
"""The agents by host: which one, and its actor."""

_free = FreeHosts()

T = TypeVar("T")


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
        _agents.clear()
        _free.forget()
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


class Submission:
    """A job on its way. Its host is one that is known to be free, of which the router is told; else the router is asked
    at once, so that the program prepares the tensors meanwhile.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._asked: Any = None
        self._free = _free.take(job)
        if (actor := _router) is not None:
            if self._free is None:
                self._asked = actor.place.remote(encode(job), [])
            else:
                actor.take.remote(encode(job), self._free.host)
        self._tensors: Any = None
        self._placed: Placed | None = None
        self._has_succeeded = False

    def result(self, tensors: bytes) -> tuple[Done, StoredTensors]:
        """Run the job, with its encoded tensors, on the cluster, and wait for its end.

        Raises:
            ClusterUnreachable: no router answers.
            XditdError: the error that ended the job.
        """
        self._tensors = ray.put(PickleBuffer(tensors))
        done, found = run_job(self, self._job)
        self._has_succeeded = True
        if self._placed is not None:
            _free.note(self._job, self._placed, done)
        return done, found

    def end(self) -> None:
        """Tell the router that the job has ended, without waiting for it."""
        if self._placed is not None and (actor := _router) is not None:
            actor.end.remote(self._job.job_id, self._placed.host, self._has_succeeded)

    def place(self, job: Job, tried: Sequence[str]) -> Placement:
        if self._free is not None and not tried:
            self._placed = self._free
            return self._free

        def ask(actor: Any) -> bytes:
            asked, self._asked = self._asked, None
            found: bytes = ray.get(actor.place.remote(encode(job), list(tried)) if asked is None else asked)
            return found

        placement: Any = Placement
        found: Placement = decode(_ask_router(ask), placement)
        self._placed = found if isinstance(found, Placed) else None
        return found

    def run(self, job: Job, placed: Placed) -> tuple[Done, StoredTensors]:
        try:
            data, found = ray.get(list(_agent(placed).run.remote(encode(job), self._tensors)))
        except LOST as error:
            raise host_lost(placed.host, error) from None
        outcome: Outcome = decode(data, Outcome)  # type: ignore[arg-type]
        if isinstance(outcome, Refused):
            raise outcome.error()
        return outcome, decode(memoryview(found), StoredTensors)


def _agent(placed: Placed) -> Any:
    """Return the actor of a host's agent, asked for once for each agent."""
    known, actor = _agents.get(placed.host, ("", None))
    if known != placed.agent:
        try:
            actor = ray.get_actor(host_actor_name(placed.host), namespace=NAMESPACE)
        except ValueError:
            raise HostLost(f"host {placed.host}: it has left the cluster") from None
        _agents[placed.host] = placed.agent, actor
    return actor


def _ask_router(ask: Callable[[Any], T]) -> T:
    """Ask the router; one that is lost meanwhile is asked again when Ray has restarted it.

    Raises:
        ClusterUnreachable: no router answers.
    """
    ends_s = time.monotonic() + _ROUTER_DEADLINE_S
    while True:
        actor = router()
        try:
            return ask(actor)
        except LOST as error:
            _forget(actor)
            if time.monotonic() > ends_s:
                raise ClusterUnreachable(f"the cluster's router does not answer: {error}") from None
            time.sleep(_RETRY_S)  # Ray restarts it


def status() -> dict[str, HostReport | Refused]:
    """Return each host's report, or why it has none.

    Raises:
        ClusterUnreachable: no router answers.
    """
    entry: Any = HostReport | Refused
    found: dict[str, bytes] = _ask_router(lambda actor: ray.get(actor.status.remote(), timeout=_ROUTER_DEADLINE_S))
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
