"""``xditd top``: watch GPUs, jobs and rates of the daemon."""

from __future__ import annotations

import argparse
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from xditd.client.cli import exits, flags
from xditd.client.cli.tables import size_text, span_text, table
from xditd.client.cli.watching import watch
from xditd.ipc.settings.client import TopFlags

if TYPE_CHECKING:
    from xditd.ipc.status import DaemonStatus, JobStatus

SUMMARY = "watch GPUs, queue, jobs and rates, until Ctrl-C"
DESCRIPTION = (
    "Show the workers' GPUs, what is lent, the jobs with the time that they still need, and the jobs and steps of the "
    "last seconds, again and again until Ctrl-C. Restarts of the daemon are waited for."
)
EXAMPLES = """\
examples:
  xditd top
  xditd top --every 0.5
  xditd status --watch 5 --json  the same facts, and all others, for programs
"""

_WINDOW_S: Final = 10.0
"""Over which rates are computed."""


class _Sample(NamedTuple):
    at_s: float
    jobs_done: int
    steps: dict[str, int]
    """Steps of each running job, by request id."""


class Rates:
    """Jobs and steps in a time, from the states of the last seconds."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()
        self._steps_between: deque[int] = deque()

    def add(self, found: DaemonStatus, now_s: float) -> None:
        """Take note of a state."""
        steps = {job.request_id: job.step for job in found.jobs}
        sample = _Sample(now_s, found.counters.jobs_done, steps)
        if self._samples and sample.jobs_done < self._samples[-1].jobs_done:
            self._samples.clear()  # another daemon
            self._steps_between.clear()
        if self._samples:
            before = self._samples[-1].steps
            self._steps_between.append(sum(max(0, step - before.get(job, 0)) for job, step in steps.items()))
        self._samples.append(sample)
        while len(self._samples) > 2 and now_s - self._samples[1].at_s >= _WINDOW_S:
            self._samples.popleft()
            self._steps_between.popleft()

    @property
    def text(self) -> str:
        """The rates as text."""
        if len(self._samples) < 2:
            return "-"
        first, last = self._samples[0], self._samples[-1]
        span_s = last.at_s - first.at_s
        if span_s <= 0:
            return "-"
        jobs, steps = (last.jobs_done - first.jobs_done) / span_s, sum(self._steps_between) / span_s
        return f"{60 * jobs:.1f} jobs a minute, {steps:.2f} steps a second, in the last {span_text(span_s)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, TopFlags)


def run(parsed: argparse.Namespace) -> int:
    rates = Rates()

    def show(found: DaemonStatus) -> str:
        rates.add(found, time.monotonic())
        return describe(found, rates.text)

    try:
        watch(parsed.runtime_dir, "xditd top", parsed.every, show)
    except KeyboardInterrupt:
        return exits.INTERRUPTED  # its normal end
    return exits.DONE


def describe(found: DaemonStatus, rates: str) -> str:
    """Format what changes from second to second."""
    counters = found.counters
    ended = f"{counters.jobs_done} done, {counters.jobs_failed} failed, {counters.jobs_cancelled} cancelled"
    on_loan = ", ".join(f"{size_text(size)} {tier}" for tier, size in found.lent_bytes.items()) or "nothing"
    lines = [
        f"daemon   {found.package_version}, pid {found.pid}, up {span_text(found.uptime_s)}, {found.clients} clients",
        f"workers  {found.group_state.value}{f': {found.group_detail}' if found.group_detail else ''}",
        f"jobs     {len(found.jobs)} of at most {found.queue_limit} in the queue; {ended}",
        f"rates    {rates}",
        f"on loan  {len(found.components)} components, {on_loan}",
    ]
    if found.workers:
        rows = [
            (each.rank, each.device, size_text(each.memory_bytes) if each.memory_bytes else "-", each.loaded, each.pid)
            for each in found.workers
        ]
        lines += ["", table(("RANK", "DEVICE", "IN USE", "LOADED", "PID"), rows)]
    if found.jobs:
        jobs = [
            (each.op, each.state.value, f"{each.step}/{each.total_steps}" if each.total_steps else "-",
             span_text(each.waited_s), span_text(each.ran_s), _left(each), each.owner_pid)
            for each in found.jobs
        ]  # fmt: skip
        lines += ["", table(("JOB", "STATE", "STEP", "WAITED", "RAN", "LEFT", "OWNER"), jobs)]
    return "\n".join(lines)


def _left(job: JobStatus) -> str:
    """Format how long the steps of a job still take, at the pace of those before."""
    if not job.step or job.step >= job.total_steps:
        return "-"
    return span_text(job.ran_s / job.step * (job.total_steps - job.step))
