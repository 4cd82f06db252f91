"""Soak test: run clients while faults are injected; check results, deadlines and leaks."""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import leaks
import oracle
from crowd import CLIENTS, ClientProcesses
from faults import Broken, Fault, NotNow, Pace, StressRun
from findings import Findings
from record import JOB_DEADLINE_S, Record
from target import START_S, Target

from xditd.client import Client, DaemonStatus, XditdError
from xditd.ipc.status import GroupState

LIGHT_GAP_S = (1.0, 6.0)
HEAVY_GAP_S = (3.0, 10.0)
RIGHT_BETWEEN = CLIENTS
"""Right results between two heavy faults, so that not only rebuilds are tested."""
UNSERVED_S = 300.0
"""After so long without a right result, the daemon serves nobody any more."""
PROGRESS_S = 10.0
FULL_MIX_MINUTES = 10.0
"""A run of this length must have injected each fault."""


class Soak:
    """One daemon, its clients, and the injected faults; use it in a ``with`` block."""

    def __init__(self, faults: Iterable[Fault], seed: int) -> None:
        self._faults = tuple(faults)
        self._rng = random.Random(seed)
        self.record = Record()
        self._folder = Path(tempfile.mkdtemp(prefix="stress-"))
        self.target = Target(self._folder)
        actions = [fault.name for fault in self._faults if fault.pace is Pace.BY_CLIENTS]
        self._clients = ClientProcesses(self._folder, self.target.runtime.path, actions, self.record, self._rng)
        self._stress = StressRun(self.target, self._clients, self.record, self._rng)
        self._heavy_left: list[Fault] = []

    def run(self, minutes: float) -> Findings:
        """Make the references, run clients and faults, and return the findings."""
        oracle.write_checkpoints(self._folder)
        self.target.wait_ready()
        with Client(self.target.runtime.path, name="oracle") as client:
            oracle.make_references(client, self._folder, JOB_DEADLINE_S)
        before = self.target.wait_idle()
        self._clients.start()
        began = time.monotonic()
        self._inject_faults(began, began + minutes * 60)
        self._clients.close()
        after = self.target.wait_idle(before)
        return self._make_findings(before, after, minutes)

    def _inject_faults(self, began: float, ends: float) -> None:
        next_light, next_heavy, next_progress = began + LIGHT_GAP_S[1], began + HEAVY_GAP_S[1], began
        right, served_at, right_at_fault = 0, began, 0
        while (now := time.monotonic()) < ends:
            time.sleep(0.25)
            if self.record.right > right:
                right, served_at = self.record.right, now
            if now >= next_light:
                next_light = now + self._rng.uniform(*LIGHT_GAP_S)
                self._inject_light()
            if now >= next_heavy and right >= right_at_fault + RIGHT_BETWEEN and self._inject_heavy():
                next_heavy, right_at_fault = time.monotonic() + self._rng.uniform(*HEAVY_GAP_S), self.record.right
                served_at = time.monotonic()
            self._clients.check()
            status = None
            if now >= next_progress:
                next_progress = now + PROGRESS_S
                status = self._show_progress(now - began, ends - began)
            if self.target.process.poll() is not None:
                self._restart("the daemon ended by itself", f"with status {self.target.process.returncode}")
            elif status is not None and status.group_state is GroupState.GIVEN_UP:
                self._restart("the workers were given up", status.group_detail)
            elif now - served_at > UNSERVED_S:
                self._restart("nobody is served", f"no right result within {UNSERVED_S:.0f} s")
                served_at = time.monotonic()

    # --- Faults

    def _inject_light(self) -> None:
        light = [fault for fault in self._faults if fault.pace is Pace.LIGHT]
        if light:
            self._inject(self._rng.choices(light, [fault.weight for fault in light])[0])

    def _inject_heavy(self) -> bool:
        """Inject the next heavy fault in shuffled order; returns whether it could be injected."""
        if not self._heavy_left:
            self._heavy_left = [fault for fault in self._faults if fault.pace is Pace.HEAVY]
            self._rng.shuffle(self._heavy_left)
        if not self._heavy_left or not self._inject(self._heavy_left[-1]):
            return False
        self._heavy_left.pop()
        return True

    def _inject(self, fault: Fault) -> bool:
        assert fault.inject is not None
        try:
            fault.inject(self._stress)
        except NotNow:
            return False
        except (Broken, XditdError, TimeoutError) as error:
            self._restart(fault.name, str(error))
        self.record.count_fault(fault.name)
        return True

    def _restart(self, what: str, detail: str) -> None:
        """Record a broken guarantee, and restart the daemon."""
        print(f"BROKEN: {what}: {detail}", file=sys.stderr, flush=True)
        self.record.add_broken(what, f"{detail}; the daemon's last warnings: {self.target.log_tail()}")
        self.record.expect_daemon_gone(START_S)
        self.record.samples.clear()
        self.target.restart()

    # --- Results

    def _show_progress(self, elapsed_s: float, total_s: float) -> DaemonStatus | None:
        status, held = self.target.find_status(), self.target.find_resources()
        if status is None:
            self.record.add_broken("a status request was not answered", f"after {elapsed_s:.0f} s of the run")
        if held is not None:
            self.record.samples.append((time.monotonic() - self.target.started_at, held.daemon_bytes))
        record = self.record
        columns = [
            f"{elapsed_s:5.0f}/{total_s:.0f} s",
            f"right {record.right}  wrong {record.wrong}  hung {record.hangs}",
            f"typed errors {len(record.errors)}  faults {sum(record.faults.values())}  broken {record.broken.total()}",
            f"group {status.group_state.value if status else '?'}",
            f"fds {held.daemon_fds}  RSS {leaks.mib(held.daemon_bytes)} MiB" if held else "fds ?",
        ]
        print("  ".join(columns), file=sys.stderr, flush=True)
        return status

    def _make_findings(
        self, before: leaks.ResourceCounts | None, after: leaks.ResourceCounts | None, minutes: float
    ) -> Findings:
        record = self.record
        self.target.stop()
        leaked = leaks.find_slope(record.samples, minutes)
        if before and after:
            leaked += leaks.find_leaks(before, after, self.target.listeners_lost)
        else:
            leaked.append("the daemon's resources could not be counted")
        leaked += self.target.problems
        failures = record.find_failures() + [f"leaked: {leak}" for leak in leaked]
        if record.right < CLIENTS:
            failures.append(f"{record.right} right results: fewer than {CLIENTS}")
        done = {fault.name: record.faults[fault.name] for fault in self._faults}
        if minutes >= FULL_MIX_MINUTES:
            failures += [f"{name}: was never injected" for name, count in done.items() if not count]
        figures: dict[str, Any] = {
            "right": record.right,
            "wrong": record.wrong,
            "hung": record.hangs,
            "leaked": len(leaked),
            "promises broken": record.broken.total(),
            "lends": record.lends,
            "slowest answer (s)": round(record.slowest_s, 1),
            "typed errors": dict(sorted(Counter(error.code for error in record.errors).items())),
            "faults": done,
            "daemons started": self.target.starts,
        }
        if before and after:
            figures |= {
                "daemon descriptors (before, after)": [before.daemon_fds, after.daemon_fds],
                "processes below it": [before.processes, after.processes],
                "workers' descriptors": [before.worker_fds, after.worker_fds],
                "mapped segments": [before.segments, after.segments],
                "daemon RSS (MiB)": [leaks.mib(before.daemon_bytes), leaks.mib(after.daemon_bytes)],
                "daemon RSS slope (KiB/min)": round(leaks.slope_bytes_per_minute(record.samples) / 1024, 1),
                "largest worker (MiB)": [
                    leaks.mib(before.largest_worker_bytes),
                    leaks.mib(after.largest_worker_bytes),
                ],
            }
        return Findings(figures, failures, record.notes)

    def __enter__(self) -> Soak:
        return self

    def __exit__(self, *_: object) -> None:
        self._clients.close()
        with contextlib.suppress(ProcessLookupError):
            self.target.stop()
        shutil.rmtree(self._folder)
