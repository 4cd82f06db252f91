"""The router, without Ray: it chooses the host of each job. Programs send their jobs to that host themselves.

A host's cost for a job is the wait for its queue, as measured, and the time of the lends that the job needs there. Of
hosts that wait equally long one whose workers hold the weights is chosen; a host that has to lend them first is chosen
when the others' queues take longer than that. Nothing here must be kept: a new router asks the hosts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import msgspec

from xditd.client.cluster.errors import HostLost
from xditd.client.cluster.messages import (
    HostReport,
    Job,
    Placed,
    Placement,
    Unplaced,
    check_versions,
    refusal,
)
from xditd.ipc.errors import DaemonUnreachable, ProtocolMismatch, UnknownComponent, WorkersUnavailable, XditdError

ASSUMED_JOB_S: Final = 5.0
"""Of a host that has run none."""

ASSUMED_LEND_BYTES_PER_S: Final = 1e9
LEND_S: Final = 0.2
"""What a lend takes beside its bytes."""

START_S: Final = 10.0
"""What workers that are starting take until they serve; their daemon queues jobs meanwhile."""

_FRESH_S: Final = 2.0
"""How old a report may be. A report that is newer costs a round trip; jobs sent since are counted here."""

_ARRIVAL_S: Final = 60.0
"""How long a job that was placed on a host, and whose end nobody has told, may be missing in the host's reports: until
it arrives there. Then its program is gone."""


class HostHandle(Protocol):
    """How a router asks a host."""

    def report(self) -> HostReport:
        """Return the host's report; a host that is lost raises :class:`HostLost`."""
        ...


class _Sent(NamedTuple):
    job: Job
    placed_s: float


@dataclass(eq=False)
class _Known:
    """What the router knows of a host: its last report, and the jobs placed there, by id.

    ``ended`` are the jobs that ended there since the report was asked for, with the time of that end: the report may
    still have them running. ``gained`` are the contents of those that succeeded, which the workers hold now.
    """

    report: HostReport | None = None
    error: XditdError | None = None
    sent: dict[str, _Sent] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    gained: dict[str, float] = field(default_factory=dict)

    def take(self, answer: HostReport | XditdError, asked_s: float) -> None:
        """Replace the report by the answer to a question of the time ``asked_s``."""
        self.error = answer if isinstance(answer, XditdError) else None
        self.report = None if isinstance(answer, XditdError) else answer
        self.ended = {job_id: ended_s for job_id, ended_s in self.ended.items() if ended_s >= asked_s}
        self.gained = {digest: ended_s for digest, ended_s in self.gained.items() if ended_s >= asked_s}
        if self.report is not None:
            running, arrived_s = self.report.running, asked_s - _ARRIVAL_S
            self.sent = {
                job_id: each for job_id, each in self.sent.items() if job_id in running or each.placed_s > arrived_s
            }

    def current(self) -> HostReport | None:
        """Return the report with what has changed since."""
        if self.report is None:
            return None
        running = {job_id: work for job_id, work in self.report.running.items() if job_id not in self.ended}
        return msgspec.structs.replace(self.report, resident=(*self.report.resident, *self.gained), running=running)


class Router:
    """Chooses among the hosts that ``set_hosts`` names, and counts the jobs that it has placed. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: dict[str, HostHandle] = {}
        self._known: dict[str, _Known] = {}
        self._asking = threading.Lock()
        self._asked_s = float("-inf")

    def set_hosts(self, hosts: Mapping[str, HostHandle]) -> None:
        """Replace the hosts."""
        with self._lock:
            self._hosts = dict(hosts)
            self._known = {name: self._known.get(name, _Known()) for name in hosts}

    def reports(self) -> dict[str, HostReport | XditdError]:
        """Ask each host; return its report, or the error of one that does not answer."""
        self._ask(0.0)
        with self._lock:
            found = {name: each.error or each.report for name, each in self._known.items()}
        return {name: each for name, each in found.items() if each is not None}

    def place(self, job: Job, tried: Sequence[str] = ()) -> Placement:
        """Choose the best host for a job, and count the job there until :meth:`end`.

        ``tried`` are hosts that have failed it: they are not chosen, and have to answer before they get other jobs.
        """
        for name in tried:
            self._distrust(name)
        self._ask(_FRESH_S)
        costs: dict[str, float] = {}
        refusals: dict[str, XditdError] = {}
        with self._lock:
            for known in self._known.values():
                known.sent.pop(job.job_id, None)  # of a placement whose answer was lost
            for name, known in self._known.items():
                if name in tried:
                    continue
                report = known.current()
                if report is None:
                    refusals[name] = known.error or HostLost(f"host {name}: it has not answered yet")
                elif (why := _why_not(name, report, job)) is not None:
                    refusals[name] = why
                else:
                    costs[name] = cost_s(report, [each.job for each in known.sent.values()], job)
            if not costs:
                return _unplaced(job, refusals, tried)
            best = min(costs, key=lambda name: (costs[name], name))
            known = self._known[best]
            known.sent[job.job_id] = _Sent(job, time.monotonic())
            assert known.report is not None
            return Placed(host=best, agent=known.report.agent)

    def take(self, job: Job, host: str) -> None:
        """Count a job whose program knew by itself that the host is free, until :meth:`end`."""
        with self._lock:
            known = self._known.get(host)
            if known is not None and job.job_id not in known.ended:  # the end may arrive first
                known.sent[job.job_id] = _Sent(job, time.monotonic())

    def end(self, job_id: str, host: str, has_succeeded: bool) -> None:
        """Count a job no longer that was placed on a host."""
        with self._lock:
            known = self._known.get(host)
            if known is None:
                return  # the host left
            sent, now_s = known.sent.pop(job_id, None), time.monotonic()
            known.ended[job_id] = now_s
            if has_succeeded and sent is not None:  # else another router placed the job
                known.gained.update(dict.fromkeys(sent.job.digests, now_s))

    def _distrust(self, name: str) -> None:
        """Forget a host's report; the next placement asks again."""
        with self._lock:
            known = self._known.get(name)
            if known is not None and known.report is not None:
                known.report = None
                self._asked_s = float("-inf")

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


def _why_not(name: str, report: HostReport, job: Job) -> XditdError | None:
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


def _unplaced(job: Job, refusals: Mapping[str, XditdError], tried: Sequence[str]) -> Unplaced:
    may_change = not (refusals or tried) or any(isinstance(each, HostLost) for each in refusals.values())
    return Unplaced(reason=refusal("", _no_host(job, refusals, tried)), may_change=may_change)


def _no_host(job: Job, refusals: Mapping[str, XditdError], tried: Sequence[str]) -> XditdError:
    if not refusals:
        return HostLost("the cluster has no " + ("other host" if tried else "host: run `xditd cluster join` on one"))
    who = "no other host" if tried else "no host"
    reasons = "; ".join(error.detail for error in refusals.values())
    for kind in (HostLost, WorkersUnavailable, DaemonUnreachable, ProtocolMismatch):
        if any(isinstance(error, kind) for error in refusals.values()):
            return kind(f"{who} can run job {job.job_id}: {reasons}")
    return UnknownComponent(f"{who} has the files of job {job.job_id}: {reasons}")


def _report_of(host: HostHandle) -> HostReport | XditdError:
    try:
        return host.report()
    except XditdError as error:
        return error
