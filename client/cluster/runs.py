"""The runs of a job, in the program that sends it: the router names its host, and if that fails, one more."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

import msgspec

from xditd.client.cluster.errors import HOST_FAULTS
from xditd.client.cluster.messages import Done, Job, Placed, Placement
from xditd.ipc.errors import XditdError

logger = logging.getLogger(__name__)

LOST_HOST_WAIT_S: Final = 15.0
"""How long a job waits for a host that is lost: Ray restarts an agent within seconds."""

_LOOK_AGAIN_S: Final = 0.2

_FREE_S: Final = 1.0
"""How long a host that had no other job is taken to have none."""

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class FreeHosts:
    """The hosts that had no other job when they ended one of this program. For any thread.

    A host that holds what a job needs and has nothing else to do is as good as any that the router knows, so such a
    job goes there without a question. Only one does: the next ones ask, until that host is free again.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[Placed, float]] = {}

    def note(self, job: Job, placed: Placed, done: Done) -> None:
        """Take note of a job that its host ended."""
        if done.is_free:
            self._known[_needs(job)] = placed, time.monotonic()

    def take(self, job: Job) -> Placed | None:
        """Return the host for a job, once."""
        placed, free_s = self._known.pop(_needs(job), (None, 0.0))
        return placed if time.monotonic() - free_s <= _FREE_S else None

    def forget(self) -> None:
        """Forget all hosts: they are of another cluster."""
        self._known.clear()


def _needs(job: Job) -> tuple[object, ...]:
    return (*job.digests, job.compute_dtype)


class Hosts(Protocol[R_co]):
    """How a program reaches the router and the hosts."""

    def place(self, job: Job, tried: Sequence[str]) -> Placement:
        """Have the router choose a host for a job, other than those that were tried."""
        ...

    def run(self, job: Job, placed: Placed) -> tuple[Done, R_co]:
        """Run a job on its host, and wait for its end; raises the error that ended it, or ``HostLost``."""
        ...


def run_job(hosts: Hosts[R], job: Job, wait_s: float = LOST_HOST_WAIT_S) -> tuple[Done, R]:
    """Run a job, and wait for its end; returns its outcome, with what the host returned beside it.

    If its host is lost, or fails for a reason of its own, the job is run once on another host. If no host can run it,
    it waits up to ``wait_s``, or its own deadline, for hosts that are lost.

    Raises:
        UnknownComponent: no host has the files.
        HostLost, WorkersUnavailable, DaemonUnreachable: no host that has them can run it; the message says why.
        XditdError: the error of the second host, or one that every host would give.
    """
    placed = _wait_for_host(hosts, job, [], wait_s)
    try:
        return hosts.run(job, placed)
    except HOST_FAULTS as error:
        logger.warning("job is run on another host job_id=%s host=%s reason=%s", job.job_id, placed.host, error.detail)
        first_error = error
    try:
        placed = _wait_for_host(hosts, job, [placed.host], wait_s)
    except XditdError as error:
        raise type(first_error)(f"{first_error.detail}; and {error.detail}") from None
    done, found = hosts.run(job, placed)
    return msgspec.structs.replace(done, runs=2), found


def _wait_for_host(hosts: Hosts[R], job: Job, tried: Sequence[str], wait_s: float) -> Placed:
    ends_s = time.monotonic() + (wait_s if job.deadline_s is None else min(wait_s, job.deadline_s))
    while True:
        answer = hosts.place(job, tried)
        if isinstance(answer, Placed):
            return answer
        if not answer.may_change or time.monotonic() >= ends_s:
            raise answer.reason.error()
        time.sleep(_LOOK_AGAIN_S)  # nothing tells of a host that is back
