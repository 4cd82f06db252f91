"""The two actors of a cluster: an agent on each host, and the router. Ray restarts both; no state is lost with them.

Their methods take and return bytes of ``messages.py`` and references to such, so that nothing of xditd is pickled.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import ray
import ray.util

from xditd.client.cluster.errors import HostLost
from xditd.client.cluster.host import HostAgent
from xditd.client.cluster.messages import (
    HERE,
    HostReport,
    Job,
    Outcome,
    StoredTensors,
    decode,
    encode,
    refusal,
)
from xditd.client.cluster.names import HOST_PREFIX, LOST, NAMESPACE, ROUTER, host_actor_name, host_resource
from xditd.client.cluster.router import Router
from xditd.ipc.errors import Internal, XditdError

logger = logging.getLogger(__name__)

_REPORT_DEADLINE_S: Final = 2.0
_HOSTS_EVERY_S: Final = 0.5
_LOST_HOST_WAIT_S: Final = 15.0
_HOST_THREADS: Final = 64
_ROUTER_THREADS: Final = 512
_CONTROL: Final = "control"
_CONTROL_THREADS: Final = 8

Method = TypeVar("Method", bound=Callable[..., object])


def _control(method: Method) -> Method:
    """Give a method, which returns at once, threads beside those of the jobs, which may all be taken."""
    marked: Method = ray.method(concurrency_group=_CONTROL)(method)
    return marked


class HostActor:
    """A host's agent in an actor."""

    def __init__(self, name: str, search_path: list[str], runtime_dir: str | None) -> None:
        _configure_logging()
        folder = None if runtime_dir is None else Path(runtime_dir)
        self._agent = HostAgent(name, [Path(each) for each in search_path], folder)

    @_control
    def report(self) -> bytes:
        return encode(self._agent.report())

    def run(self, job: bytes, tensors: bytes) -> tuple[bytes, bytes]:
        """Run a job; returns its outcome, and its tensors in an object of their own."""
        try:
            outcome, found = self._agent.run(decode(job, Job), decode(tensors, StoredTensors))
            return encode(outcome), encode(found)
        except XditdError as error:
            return encode(refusal(self._agent.name, error)), b""
        except Exception as error:
            logger.exception("bug in the host's agent")
            return encode(refusal(self._agent.name, Internal(f"{type(error).__name__}: {error}"))), b""

    @_control
    def leave(self) -> None:
        self._agent.leave()


class _RemoteHost:
    """A host as the router reaches it: tensors are references, which the router never fetches."""

    def __init__(self, name: str, actor: Any) -> None:
        self._name = name
        self._actor = actor

    def report(self) -> HostReport:
        try:
            return decode(ray.get(self._actor.report.remote(), timeout=_REPORT_DEADLINE_S), HostReport)
        except LOST as error:
            raise _lost(self._name, error) from None

    def run(self, job: Job, tensors: Any) -> tuple[Outcome, Any]:
        try:
            outcome, found = self._actor.run.options(num_returns=2).remote(encode(job), tensors)
            return decode(ray.get(outcome), Outcome), found  # type: ignore[arg-type]
        except LOST as error:
            raise _lost(self._name, error) from None


class RouterActor:
    """The router in an actor. It looks for hosts by their names, so a new one knows them within a second.

    It asks them for reports all the time, so that a job seldom waits for one.
    """

    def __init__(self) -> None:
        _configure_logging()
        self._router: Router[Any, Any] = Router(wait_s=_LOST_HOST_WAIT_S)
        self._known: dict[str, Any] = {}
        self._find_hosts()
        threading.Thread(target=self._keep_finding, daemon=True).start()

    @_control
    def versions(self) -> bytes:
        return encode(HERE)

    def run(self, job: bytes, tensors: list[Any]) -> tuple[bytes, list[Any]]:
        """Run a job. ``tensors`` is a list of one reference, so that Ray does not fetch it here; so is the result's."""
        try:
            outcome, found = self._router.run(decode(job, Job), tensors[0])
        except XditdError as error:
            return encode(refusal("", error)), []
        except Exception as error:
            logger.exception("bug in the router")
            return encode(refusal("", Internal(f"{type(error).__name__}: {error}"))), []
        return encode(outcome), [found]

    @_control
    def status(self) -> dict[str, bytes]:
        """Return each host's report, or its error."""
        self._find_hosts()
        found = self._router.reports(max_age_s=0.0)
        return {
            name: encode(refusal(name, each) if isinstance(each, XditdError) else each) for name, each in found.items()
        }

    def _find_hosts(self) -> None:
        names = {each for each in ray.util.list_named_actors() if each.startswith(HOST_PREFIX)}
        for name in names:
            try:
                # Asked again each time: an actor of the same name may be another one after a rejoin.
                self._known[name] = ray.get_actor(name)
            except (ValueError, *LOST):
                self._known.pop(name, None)
        for name in self._known.keys() - names:
            del self._known[name]
        self._router.set_hosts(
            {
                name.removeprefix(HOST_PREFIX): _RemoteHost(name.removeprefix(HOST_PREFIX), each)
                for name, each in self._known.items()
            }
        )

    def _keep_finding(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(_HOSTS_EVERY_S)
            try:
                self._find_hosts()
                self._router.reports()
            except LOST as error:
                logger.warning("hosts are not listed: %s", error)


def make_router() -> Any:
    """Return the router, made on the head if there is none."""
    options = {
        "name": ROUTER,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": _ROUTER_THREADS,
        "num_cpus": 0,
        "resources": {"node:__internal_head__": 0.001},
    }
    return _with_control(RouterActor).options(**options).remote()


def make_host(name: str, search_path: list[str], runtime_dir: str | None) -> Any:
    """Make a host's actor, which only that host's Ray can run.

    Raises:
        ValueError: there is one of this name.
    """
    options = {
        "name": host_actor_name(name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": -1,
        # A job must not run again without the router's knowledge.
        "max_task_retries": 0,
        "max_concurrency": _HOST_THREADS,
        "num_cpus": 0,
        "resources": {host_resource(name): 0.001},
    }
    return _with_control(HostActor).options(**options).remote(name, search_path, runtime_dir)


def _with_control(actor: type) -> Any:
    return ray.remote(concurrency_groups={_CONTROL: _CONTROL_THREADS})(actor)


def _lost(name: str, error: Exception) -> HostLost:
    kind = type(error).__name__
    first = (str(error).strip().splitlines() or [""])[0]
    return HostLost(f"host {name}: lost, or the link to it is cut ({kind}: {first:.200})")


def _configure_logging() -> None:
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
