"""The two actors of a cluster: an agent on each host, and the router. Ray restarts both; no state is lost with them.

Their methods take and return bytes of ``messages.py`` and references to such, so that nothing of xditd is pickled.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from pickle import PickleBuffer
from typing import Any, Final, TypeVar

import ray
import ray.util

from xditd.client.cluster.host import HostAgent
from xditd.client.cluster.messages import (
    HERE,
    HostReport,
    Job,
    Outcome,
    Placement,
    StoredTensors,
    Unplaced,
    decode,
    encode,
    refusal,
)
from xditd.client.cluster.names import (
    HOST_PREFIX,
    LOST,
    NAMESPACE,
    ROUTER,
    host_actor_name,
    host_lost,
    host_resource,
)
from xditd.client.cluster.router import Router
from xditd.ipc.errors import Internal, XditdError

logger = logging.getLogger(__name__)

_REPORT_DEADLINE_S: Final = 2.0
_HOSTS_EVERY_S: Final = 0.5
_HOST_THREADS: Final = 64
_ROUTER_THREADS: Final = 32
_CONTROL: Final = "control"
_CONTROL_THREADS: Final = 8

Method = TypeVar("Method", bound=Callable[..., object])


def _control(method: Method) -> Method:
    """Give a method, which returns at once, threads beside those of the jobs, which may all be taken."""
    marked: Method = ray.method(concurrency_group=_CONTROL)(method)
    return marked


def _returns_two(method: Method) -> Method:
    """Give each of a method's two results an object of its own."""
    marked: Method = ray.method(num_returns=2)(method)
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

    @_returns_two
    def run(self, job: bytes, tensors: Any) -> tuple[bytes, PickleBuffer]:
        """Run a job; returns its outcome, and its tensors in an object of their own.

        ``tensors`` is a buffer in this host's object store, which is not copied.
        """
        found: StoredTensors = {}
        outcome: Outcome
        try:
            outcome, found = self._agent.run(decode(job, Job), decode(memoryview(tensors), StoredTensors))
        except Exception as error:  # noqa: BLE001 - the program raises it
            outcome = refusal(self._agent.name, _typed(error, "the host's agent"))
        return encode(outcome), PickleBuffer(encode(found))

    @_control
    def leave(self) -> None:
        self._agent.leave()


class _RemoteHost:
    """A host as the router reaches it."""

    def __init__(self, name: str, actor: Any) -> None:
        self._name = name
        self._actor = actor

    def report(self) -> HostReport:
        try:
            return decode(ray.get(self._actor.report.remote(), timeout=_REPORT_DEADLINE_S), HostReport)
        except LOST as error:
            raise host_lost(self._name, error) from None


class RouterActor:
    """The router in an actor. It looks for hosts by their names, so a new one knows them within a second.

    It asks them for reports all the time, so that a job seldom waits for one.
    """

    def __init__(self) -> None:
        _configure_logging()
        self._router = Router()
        self._known: dict[str, Any] = {}
        self._find_hosts()
        threading.Thread(target=self._keep_finding, daemon=True).start()

    def versions(self) -> bytes:
        return encode(HERE)

    def place(self, job: bytes, tried: list[str]) -> bytes:
        """Return the :data:`Placement` of a job."""
        answer: Placement
        try:
            answer = self._router.place(decode(job, Job), tried)
        except Exception as error:  # noqa: BLE001 - the program raises it
            answer = Unplaced(reason=refusal("", _typed(error, "the router")), may_change=False)
        return encode(answer)

    def take(self, job: bytes, host: str) -> None:
        self._router.take(decode(job, Job), host)

    def end(self, job_id: str, host: str, has_succeeded: bool) -> None:
        self._router.end(job_id, host, has_succeeded)

    def status(self) -> dict[str, bytes]:
        """Return each host's report, or its error."""
        self._find_hosts()
        found = self._router.reports()
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
    return ray.remote(RouterActor).options(**options).remote()


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
    actor = ray.remote(concurrency_groups={_CONTROL: _CONTROL_THREADS})(HostActor)
    return actor.options(**options).remote(name, search_path, runtime_dir)


def _typed(error: Exception, where: str) -> XditdError:
    """Return the error to answer with; one that is no :class:`XditdError` is a bug, and is logged."""
    if isinstance(error, XditdError):
        return error
    logger.error("bug in %s", where, exc_info=error)
    return Internal(f"{type(error).__name__}: {error}")


def _configure_logging() -> None:
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
