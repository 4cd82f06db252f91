"""The router, without Ray: it chooses the host of each job, and runs a lost host's jobs once elsewhere.

A host's cost for a job is the wait for its queue, as measured, and the time of the lends that the job needs there. Of
hosts that wait equally long one whose workers hold the weights is chosen; a host that has to lend them first is chosen
when the others' queues take longer than that. Nothing here must be kept: a new router asks the hosts what they run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

import msgspec

from xditd.client.cluster.errors import HOST_FAULTS, HostLost
from xditd.client.cluster.messages import Done, HostReport, Job, Outcome, Refused, check_versions
from xditd.ipc.errors import DaemonUnreachable, ProtocolMismatch, UnknownComponent, WorkersUnavailable, XditdError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

ASSUMED_JOB_S: Final = 5.0
"""Of a host that has run none."""

ASSUMED_LEND_BYTES_PER_S: Final = 1e9
LEND_S: Final = 0.2
"""What a lend takes beside its bytes."""

START_S: Final = 10.0
"""What workers that are starting take until they serve; their daemon queues jobs meanwhile."""

_FRESH_S: Final = 2.0
"""How old a report may be. A report that is newer costs a round trip; jobs sent since are counted here."""

_LOOK_AGAIN_S: Final = 0.2

P = TypeVar("P")
Q = TypeVar("Q")
P_contra = TypeVar("P_contra", contravariant=True)
Q_co = TypeVar("Q_co", covariant=True)


class HostHandle(Protocol[P_contra, Q_co]):
    """How a router reaches a host. A host that is lost raises :class:`HostLost` from both methods."""

    def report(self) -> HostReport: ...

    def run(self, job: Job, tensors: P_contra) -> tuple[Outcome, Q_co]:
        """Run a job, and wait for its end; the tensors of a result are not looked at."""
        ...


@dataclass(eq=False)
class _Known:
    """What the router knows of a host: its last report, and the jobs sent since, by id, with their work.

    ``ended`` are the jobs that ended there since the report was asked for, with the time of that end: the report may
    still have them running. ``gained`` are the contents of those that succeeded, which the workers hold now.
    """

    report: HostReport | None = None
    error: XditdError | None = None
    sent: dict[str, Job] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    gained: dict[str, float] = field(default_factory=dict)

    def take(self, answer: HostReport | XditdError, asked_s: float) -> None:
        """Replace the report by the answer to a question of the time ``asked_s``."""
        self.error = answer if isinstance(answer, XditdError) else None
        self.report = None if isinstance(answer, XditdError) else answer
        self.ended = {job_id: ended_s for job_id, ended_s in self.ended.items() if ended_s >= asked_s}
        self.gained = {digest: ended_s for digest, ended_s in self.gained.items() if ended_s >= asked_s}

    def current(self) -> HostReport | None:
        """Return the report with what has changed since."""
        if self.report is None:
            return None
        running = {job_id: work for job_id, work in self.report.running.items() if job_id not in self.ended}
        return msgspec.structs.replace(self.report, resident=(*self.report.resident, *self.gained), running=running)


class Router(Generic[P, Q]):
    """Routes jobs to the hosts that ``set_hosts`` names. For any thread: each waits for its own job.

    A job waits up to ``wait_s`` for hosts that are lost: Ray restarts an agent within seconds.
    """

    def __init__(self, wait_s: float = 0.0) -> None:
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._hosts: dict[str, HostHandle[P, Q]] = {}
        self._known: dict[str, _Known] = {}
        self._asking = threading.Lock()
        self._asked_s = float("-inf")

    def set_hosts(self, hosts: Mapping[str, HostHandle[P, Q]]) -> None:
        """Replace the hosts."""
        with self._lock:
            self._hosts = dict(hosts)
            self._known = {name: self._known.get(name, _Known()) for name in hosts}

    def reports(self, *, max_age_s: float = 0.0) -> dict[str, HostReport | XditdError]:
        """Return each host's report, or the error of one that does not answer."""
        self._ask(max_age_s)
        with self._lock:
            found = {name: each.error or each.report for name, each in self._known.items()}
        return {name: each for name, each in found.items() if each is not None}

    def run(self, job: Job, tensors: P) -> tuple[Outcome, Q | None]:
        """Run a job on the best host, and wait for its end; returns its outcome, with the tensors of a result.

        If the host is lost, or fails for a reason of its own, the job is run once on another host.

        Raises:
            UnknownComponent: no host has the files.
            HostLost, WorkersUnavailable, DaemonUnreachable: no host that has them can run it; the message says why.
            XditdError: the error of the second host, or one that every host would give.
        """
        first_error: XditdError | None = None
        tried: list[str] = []
        while True:
            name = self._wait_for_host(job, tried, first_error)
            try:
                outcome, found = self._run_on(name, job, tensors)
                error = outcome.error() if isinstance(outcome, Refused) else None
            except HostLost as lost:
                error, outcome, found = lost, None, None
            if error is None:
                assert isinstance(outcome, Done)
                return (outcome if not tried else _rerun(outcome, len(tried) + 1)), found
            if not isinstance(error, HOST_FAULTS) or tried:
                raise error
            logger.warning("job is run on another host job_id=%s host=%s reason=%s", job.job_id, name, error.detail)
            first_error = error
            tried.append(name)
            self._forget_report(name)

    def choose(self, job: Job) -> str:
        """Return the host that a job would run on now; errors are those of :meth:`run`."""
        found = self._choose(job, [])
        if isinstance(found, str):
            return found
        raise _no_host(job, found, None)

    def _wait_for_host(self, job: Job, tried: list[str], first_error: XditdError | None) -> str:
        wait_s = self._wait_s if job.deadline_s is None else min(self._wait_s, job.deadline_s)
        ends_s = time.monotonic() + wait_s
        while True:
            found = self._choose(job, tried)
            if isinstance(found, str):
                return found
            may_come_back = not (found or tried) or any(isinstance(each, HostLost) for each in found.values())
            if not may_come_back or time.monotonic() >= ends_s:
                raise _no_host(job, found, first_error)
            time.sleep(_LOOK_AGAIN_S)  # reports come from the hosts; nothing tells of a host that is back

    def _choose(self, job: Job, tried: list[str]) -> str | dict[str, XditdError]:
        """Return the best host, or why each cannot run the job."""
        self._ask(_FRESH_S)
        costs: dict[str, tuple[float, str]] = {}
        refusals: dict[str, XditdError] = {}
        with self._lock:
            for name, known in self._known.items():
                if name in tried:
                    continue
                why = _why_not(name, known, job)
                if why is not None:
                    refusals[name] = why
                    continue
                report = known.current()
                assert report is not None
                if job.job_id in report.running:
                    return name  # an earlier router sent it there
                costs[name] = (cost_s(report, list(known.sent.values()), job), name)
        return min(costs, key=lambda name: costs[name]) if costs else refusals

    def _run_on(self, name: str, job: Job, tensors: P) -> tuple[Outcome, Q]:
        with self._counted(name, job) as (host, known):
            outcome, found = host.run(job, tensors)
            if isinstance(outcome, Done):
                with self._lock:
                    known.gained.update(dict.fromkeys(job.digests, time.monotonic()))
            return outcome, found

    @contextmanager
    def _counted(self, name: str, job: Job) -> Iterator[tuple[HostHandle[P, Q], _Known]]:
        with self._lock:
            host, known = self._hosts.get(name), self._known.get(name)
            if host is None or known is None:
                raise HostLost(f"host {name}: it has left the cluster")
            known.sent[job.job_id] = job
        try:
            yield host, known
        finally:
            with self._lock:
                known.sent.pop(job.job_id, None)
                known.ended[job.job_id] = time.monotonic()

    def _forget_report(self, name: str) -> None:
        with self._lock:
            self._asked_s = float("-inf")
            if name in self._known:
                self._known[name].report = None

    def _ask(self, max_age_s: float) -> None:
        """Ask every host for its report, unless that was done within ``max_age_s``."""
        with self._asking:
            with self._lock:
                if time.monotonic() - self._asked_s <= max_age_s:
                    return
                hosts = dict(self._hosts)
            began_s = time.monotonic()
            if hosts:
                with ThreadPoolExecutor(len(hosts)) as pool:
                    found = list(pool.map(_report_of, hosts.values()))
                with self._lock:
                    for name, each in zip(hosts, found, strict=True):
                        if name in self._known:
                            self._known[name].take(each, began_s)
            with self._lock:
                self._asked_s = time.monotonic()


def cost_s(report: HostReport, sent: list[Job], job: Job) -> float:
    """Estimate how long a job waits on a host before it runs: for jobs in front of it, and for its lends."""
    mean_s = report.mean_job_s or ASSUMED_JOB_S
    own = {each.job_id for each in sent}
    wait_s = sum(report.pace.get(each.transformer, mean_s / max(each.work, 1e-9)) * each.work for each in sent)
    wait_s += mean_s * (report.other_jobs + len(report.running.keys() - own))
    wait_s += START_S if report.is_starting else 0.0
    promised = {digest for each in sent for digest in each.digests}
    bytes_per_s = report.lend_bytes_per_s or ASSUMED_LEND_BYTES_PER_S
    for digest in job.digests:
        if digest not in report.resident and digest not in promised:
            wait_s += LEND_S + report.files[digest] / bytes_per_s
    return wait_s


def _why_not(name: str, known: _Known, job: Job) -> XditdError | None:
    report = known.report
    if report is None:
        return known.error or HostLost(f"host {name}: it has not answered yet")
    try:
        check_versions(report.versions, f"host {name}", job.versions)
    except ProtocolMismatch as error:
        return error
    missing = [digest for digest in job.digests if digest not in report.files]
    if missing:
        return UnknownComponent(f"host {name}: no file of content {', '.join(missing)}", names=missing)
    if not (report.is_serving or report.is_starting):
        return WorkersUnavailable(f"host {name}: {report.detail}")
    return None


def _no_host(job: Job, refusals: Mapping[str, XditdError], first_error: XditdError | None) -> XditdError:
    """Return why no host is left for a job: the error of the first run, if there was one."""
    reasons = "; ".join(error.detail for error in refusals.values()) or "the cluster has no other host"
    if first_error is not None:
        return type(first_error)(f"{first_error.detail}; and no other host can run job {job.job_id}: {reasons}")
    if not refusals:
        return HostLost("the cluster has no host: run `xditd cluster join` on one")
    kinds = {type(error) for error in refusals.values()}
    for kind in (HostLost, WorkersUnavailable, DaemonUnreachable, ProtocolMismatch):
        if kind in kinds:
            return kind(f"no host can run job {job.job_id}: {reasons}")
    return UnknownComponent(f"no host has the files of job {job.job_id}: {reasons}")


def _report_of(host: HostHandle[P, Q]) -> HostReport | XditdError:
    try:
        return host.report()
    except XditdError as error:
        return error


def _rerun(done: Done, runs: int) -> Done:
    return msgspec.structs.replace(done, runs=runs)
