"""Clients at work while things go wrong: is every result right, does everything end in time, is nothing left?"""

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
from crowd import CLIENTS, Crowd
from faults import Broken, Fault, NotNow, Pace, Scene
from findings import Findings
from record import JOB_DEADLINE_S, Record
from target import START_S, Target

from xditd.client import Client, DaemonStatus, XditdError
from xditd.ipc.status import GroupState

LIGHT_GAP_S = (1.0, 6.0)
HEAVY_GAP_S = (3.0, 10.0)
RIGHT_BETWEEN = CLIENTS
"""Right results between two heavy faults: else nothing but rebuilds is tested."""
UNSERVED_S = 300.0
"""No client has had a right result for so long: nobody is served any more."""
PROGRESS_S = 10.0
FULL_MIX_MINUTES = 10.0
"""In so long each fault has had its turn; one that has not was not tested."""


class Soak:
    """One daemon, its clients, and the faults that are done to them; use it in a ``with`` block."""

    def __init__(self, faults: Iterable[Fault], seed: int) -> None:
        self._faults = tuple(faults)
        self._rng = random.Random(seed)
        self.record = Record()
        self._folder = Path(tempfile.mkdtemp(prefix="stress-"))
        self.target = Target(self._folder)
        deeds = [fault.name for fault in self._faults if fault.pace is Pace.BY_CLIENTS]
        self._crowd = Crowd(self._folder, self.target.runtime.path, deeds, self.record, self._rng)
        self._scene = Scene(self.target, self._crowd, self.record, self._rng)
        self._deck: list[Fault] = []

    def run(self, minutes: float) -> Findings:
        """Make the references, let clients and faults loose on the daemon, and look at what is left."""
        oracle.write_checkpoints(self._folder)
        self.target.wait_ready()
        with Client(self.target.runtime.path, name="oracle") as client:
            oracle.make_references(client, self._folder, JOB_DEADLINE_S)
        before = self.target.wait_idle()
        self._crowd.start()
        began = time.monotonic()
        self._go_wrong(began, began + minutes * 60)
        self._crowd.close()
        after = self.target.wait_idle(before)
        return self._judge(before, after, minutes)

    def _go_wrong(self, began: float, ends: float) -> None:
        next_light, next_heavy, next_word = began + LIGHT_GAP_S[1], began + HEAVY_GAP_S[1], began
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
            self._crowd.check()
            status = None
            if now >= next_word:
                next_word = now + PROGRESS_S
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
        """Do the next heavy fault of a shuffled deck; whether there was anybody to do it to."""
        if not self._deck:
            self._deck = [fault for fault in self._faults if fault.pace is Pace.HEAVY]
            self._rng.shuffle(self._deck)
        if not self._deck or not self._inject(self._deck[-1]):
            return False
        self._deck.pop()
        return True

    def _inject(self, fault: Fault) -> bool:
        assert fault.inject is not None
        try:
            fault.inject(self._scene)
        except NotNow:
            return False
        except (Broken, XditdError, TimeoutError) as error:
            self._restart(fault.name, str(error))
        self.record.count_fault(fault.name)
        return True

    def _restart(self, what: str, detail: str) -> None:
        """Note a promise that does not hold, and give clients a sound daemon again."""
        print(f"BROKEN: {what}: {detail}", file=sys.stderr, flush=True)
        self.record.break_promise(what, f"{detail}; the daemon's last warnings: {self.target.log_tail()}")
        self.record.expect_daemon_gone(START_S)
        self.record.samples.clear()
        self.target.restart()

    # --- Looking

    def _show_progress(self, elapsed_s: float, total_s: float) -> DaemonStatus | None:
        status, held = self.target.find_status(), self.target.find_holdings()
        if status is None:
            self.record.break_promise("a status request was not answered", f"after {elapsed_s:.0f} s of the run")
        if held is not None:
            self.record.samples.append((time.monotonic() - self.target.started_at, held.daemon_bytes))
        record = self.record
        words = [
            f"{elapsed_s:5.0f}/{total_s:.0f} s",
            f"right {record.right}  wrong {record.wrong}  hung {record.hangs}",
            f"typed errors {len(record.errors)}  faults {sum(record.faults.values())}  broken {record.broken.total()}",
            f"group {status.group_state.value if status else '?'}",
            f"fds {held.daemon_fds}  RSS {leaks.mib(held.daemon_bytes)} MiB" if held else "fds ?",
        ]
        print("  ".join(words), file=sys.stderr, flush=True)
        return status

    def _judge(self, before: leaks.Holdings | None, after: leaks.Holdings | None, minutes: float) -> Findings:
        record = self.record
        self.target.stop()
        leaked = leaks.find_slope(record.samples, minutes)
        if before and after:
            leaked += leaks.find_leaks(before, after, self.target.listeners_lost)
        else:
            leaked.append("no daemon to look at")
        leaked += self.target.problems
        failures = record.find_failures() + [f"leaked: {leak}" for leak in leaked]
        if record.right < CLIENTS:
            failures.append(f"{record.right} right results: too few to say anything")
        done = {fault.name: record.faults[fault.name] for fault in self._faults}
        if minutes >= FULL_MIX_MINUTES:
            failures += [f"{name}: had no turn" for name, count in done.items() if not count]
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
        self._crowd.close()
        with contextlib.suppress(ProcessLookupError):
            self.target.stop()
        shutil.rmtree(self._folder)
