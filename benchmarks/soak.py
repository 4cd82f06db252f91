"""Four clients at work while things go wrong: is every image right, does everything end in time, is nothing left?

    python benchmarks/soak.py --minutes 30 --seed 7
    python benchmarks/soak.py --minutes 2 --json

One daemon with two CPU workers (gloo). Faults at random, by ``--seed``: a rank or the leader is killed, a rank is
stopped, garbage arrives on the socket, a client is killed; clients cancel, disconnect and return loans in mid-job by
themselves. Every finished result is compared, bit for bit, with the one that its checkpoint and seed gave before the
first fault. Exit status 1 when anything that must be 0 is not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import describe_machine

from xditd.client import Client, DaemonStatus, XditdError
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.status import GroupState

CLIENTS = 4
SEEDS = 6
STEPS = 4
PIXELS = 128
HANG_DEADLINE_S = 8
JOB_DEADLINE_S = 120.0
"""A request that takes longer has hung: the workers' own deadline, a rebuild and the queue fit in several times."""
RSS_GROWTH_BYTES = 16 * 2**20
RSS_SLOPE_BYTES_PER_MINUTE = 2**20
SLOPE_MINUTES = 10
"""Shorter runs see the interpreter warm up; only their total growth is judged."""


# --- One client ---------------------------------------------------------------------------------------


def run_client(number: int, folder: Path, seed: int) -> None:
    """Lend, run, cancel, return and disconnect until the process is killed; one JSON line for each thing that ends."""
    import torch

    rng = random.Random(seed)
    references = json.loads((folder / "references.json").read_text())
    torch.set_num_threads(1)

    def tell(**event: Any) -> None:
        print(json.dumps({"client": number, **event}), flush=True)

    while True:
        began = time.monotonic()
        tell(begins="session")
        try:
            with Client(folder / "run", name=f"soak-{number}", deadline_s=JOB_DEADLINE_S) as client:
                tell(ends="session", took_s=time.monotonic() - began)
                work(client, folder, rng, references, tell)
        except XditdError as error:
            tell(ends="error", code=error.code, took_s=time.monotonic() - began, detail=str(error)[:200])


def work(client: Client, folder: Path, rng: random.Random, references: dict[str, str], tell: Any) -> None:
    """Some rounds of one session; leaving it with a job under way is one of the faults."""
    for _ in range(rng.randint(2, 6)):
        checkpoint = rng.choice(("1", "2"))
        began = time.monotonic()
        tell(begins="lend")
        try:
            loan = client.lend(folder / f"{checkpoint}.safetensors", deadline_s=JOB_DEADLINE_S)
        except XditdError as error:
            tell(ends="error", code=error.code, took_s=time.monotonic() - began, detail=str(error)[:200])
            return
        tell(ends="lend", took_s=time.monotonic() - began)
        for _ in range(rng.randint(1, 4)):
            seed = rng.randrange(SEEDS)
            deed = rng.choices(("finish", "cancel", "return", "disconnect"), (12, 3, 1, 1))[0]
            began = time.monotonic()
            tell(begins="job")
            try:
                job = start_job(client, loan, seed, STEPS if deed == "finish" else 200)
                if deed == "finish":
                    right = digest(job.result().latents) == references[f"{checkpoint}/{seed}"]
                    tell(ends="job", is_right=right, took_s=time.monotonic() - began)
                    continue
                events = iter(job)
                next(events, None)
                if deed == "disconnect":
                    tell(ends="left", took_s=time.monotonic() - began)
                    return
                if deed == "return":
                    loan.return_(deadline_s=JOB_DEADLINE_S)
                else:
                    job.cancel()
                job.result()
                tell(ends="untyped", detail=f"a job ended as done after {deed}")
            except XditdError as error:
                tell(ends="error", code=error.code, took_s=time.monotonic() - began, detail=str(error)[:200])
                if not error.retryable and error.code != "cancelled":
                    break
        with contextlib.suppress(XditdError):
            loan.return_(deadline_s=JOB_DEADLINE_S)


def start_job(client: Client, loan: Any, seed: int, steps: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, 16, 4096, generator=generator), torch.randn(1, 768, generator=generator)
    return client.generate(
        loan, *embeds, height=PIXELS, width=PIXELS, steps=steps, seed=seed, deadline_s=JOB_DEADLINE_S
    )


def digest(latents: Any) -> str:
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()


# --- The daemon and what it holds ---------------------------------------------------------------------


@dataclass(frozen=True)
class Holdings:
    """What is open at one moment. ``segments`` counts memfds that the workers have mapped."""

    fds: int
    rss_bytes: int
    processes: int
    segments: int


def holdings_of(pid: int) -> Holdings:
    below = descendants(pid)
    with open(f"/proc/{pid}/statm", encoding="utf-8") as statm:
        rss = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    return Holdings(len(os.listdir(f"/proc/{pid}/fd")), rss, len(below), sum(map(count_segments, below)))


def count_segments(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
            return sum("/memfd:" in line for line in maps)
    except OSError:
        return 0


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="utf-8") as children:
                for child in map(int, children.read().split()):
                    found += [child, *descendants(child)]
    return found


def parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


# --- The soak -----------------------------------------------------------------------------------------


@dataclass
class Record:
    """Everything that is counted."""

    right: int = 0
    wrong: int = 0
    hangs: int = 0
    untyped: int = 0
    unanswered_status: int = 0
    lends: int = 0
    slowest_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)


class Soak:
    def __init__(self, seed: int) -> None:
        self.record = Record()
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="soak-"))
        self._clients: dict[int, subprocess.Popen[str]] = {}
        self._waiting: dict[int, float] = {}
        """When each client began what it waits for."""
        self._lives = 0
        self._is_over = False
        environment = {key: value for key, value in os.environ.items() if not key.startswith("XDITD_")}
        flags = ["--runtime-dir", str(self._folder / "run"), "--device", "cpu", "--workers", "2"]
        flags += ["--hang-deadline-s", str(HANG_DEADLINE_S), "--max-restarts", "1000"]
        self._log = (self._folder / "daemon.log").open("w")
        self._daemon = subprocess.Popen(
            [sys.executable, "-m", "xditd.daemon", *flags], stderr=self._log, env=environment
        )

    def prepare(self) -> Holdings:
        """Write the checkpoints, make the references, and see what an idle daemon holds."""
        from xditd.client.demo import checkpoints

        references: dict[str, str] = {}
        for name in ("1", "2"):
            checkpoints.write_flux1(self._folder / f"{name}.safetensors", seed=int(name))
        ends = time.monotonic() + JOB_DEADLINE_S
        while True:
            try:
                client = Client(self._folder / "run", name="soak")
                break
            except XditdError:
                if self._daemon.poll() is not None or time.monotonic() > ends:
                    raise
                time.sleep(0.1)
        with client:
            for name in ("1", "2"):
                with client.lend(self._folder / f"{name}.safetensors") as loan:
                    for seed in range(SEEDS):
                        latents = start_job(client, loan, seed, STEPS).result().latents
                        references[f"{name}/{seed}"] = digest(latents)
        (self._folder / "references.json").write_text(json.dumps(references))
        return self._settle()

    def run(self, minutes: float) -> None:
        began = time.monotonic()
        for number in range(CLIENTS):
            self._start_client(number)
        next_light, next_heavy, next_word, served = began + 5, began + 10, began, 0
        while time.monotonic() - began < minutes * 60:
            time.sleep(0.25)
            now = time.monotonic()
            if now >= next_light:
                next_light = now + self._rng.uniform(1, 6)
                self._inject(self._rng.choices(("garbage", "half a greeting", "kill a client"), (4, 2, 1))[0])
            # Only a group that has served again is worth another fault: else nothing but rebuilds is tested.
            if now >= next_heavy and self.record.right >= served + 2 * CLIENTS:
                next_heavy, served = now + self._rng.uniform(5, 20), self.record.right
                self._inject(self._rng.choice(("kill a rank", "kill the leader", "stop a rank")))
            self._check_clients(now)
            if now >= next_word:
                next_word = now + 10
                self._sample(now - began, minutes)
            if self._daemon.poll() is not None:
                self.record.notes.append(f"the daemon ended with status {self._daemon.returncode}")
                return

    def finish(self) -> Holdings:
        """End the clients and see what is left."""
        self._is_over = True
        for child in self._clients.values():
            child.kill()
            child.wait()
        return self._settle()

    def close(self) -> None:
        if self._daemon.poll() is None:
            self._daemon.terminate()
            try:
                self._daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
                self.record.notes.append("the daemon did not stop within 30 s of SIGTERM")
        self._log.close()
        shutil.rmtree(self._folder)

    def keep_log(self, path: Path) -> None:
        shutil.copyfile(self._folder / "daemon.log", path)

    # --- Clients

    def _start_client(self, number: int) -> None:
        self._lives += 1
        seed = self._rng.randrange(2**32)
        flags = ["--client", str(number), "--folder", str(self._folder), "--seed", str(seed)]
        child = subprocess.Popen([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True)
        with self._lock:
            self._clients[number] = child
            self._waiting[number] = time.monotonic()
        threading.Thread(target=self._listen, args=(number, child), daemon=True).start()

    def _listen(self, number: int, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            with contextlib.suppress(json.JSONDecodeError), self._lock:  # a killed client may leave half a line
                self._note(number, json.loads(line))
        child.stdout.close()

    def _note(self, number: int, event: dict[str, Any]) -> None:
        record = self.record
        self._waiting[number] = time.monotonic()
        if "begins" in event:
            return
        record.slowest_s = max(record.slowest_s, event.get("took_s", 0.0))
        kind = event["ends"]
        if kind == "job":
            record.right += event["is_right"]
            record.wrong += not event["is_right"]
        elif kind == "lend":
            record.lends += 1
        elif kind == "left":
            record.faults["client leaves in mid-job"] += 1
        elif kind == "untyped":
            record.untyped += 1
            record.notes.append(event["detail"])
        elif kind == "error":
            record.errors[event["code"]] += 1
            if event["code"] in ("deadline_exceeded", "daemon_unreachable", "internal", "bad_message"):
                record.notes.append(f"client {number}: {event['code']}: {event['detail']}")
            record.hangs += event["code"] == "deadline_exceeded"

    def _check_clients(self, now: float) -> None:
        for number, child in list(self._clients.items()):
            if child.poll() is not None and not self._is_over:
                # Nobody killed it: an error that is not ours ended it.
                self.record.untyped += 1
                self.record.notes.append(f"client {number} ended with status {child.returncode}; see standard error")
                self._start_client(number)
            elif now - self._waiting[number] > JOB_DEADLINE_S + 15:
                self.record.hangs += 1
                self.record.notes.append(f"client {number} waited {now - self._waiting[number]:.0f} s for an answer")
                child.kill()
                child.wait()
                self._start_client(number)

    # --- Faults

    def _inject(self, fault: str) -> None:
        try:
            if fault == "kill a client":
                number = self._rng.randrange(CLIENTS)
                self._clients[number].kill()
                self._clients[number].wait()
                self._start_client(number)
            elif fault in ("garbage", "half a greeting"):
                self._send_garbage(whole=fault == "garbage")
            else:
                status = self._status()
                if status is None or status.group_state not in (GroupState.READY, GroupState.BUSY):
                    return  # being rebuilt: there is nobody to kill
                victim = self._rng.choice(status.workers).pid
                if fault == "kill the leader":
                    victim = parent_of(victim)
                os.kill(victim, signal.SIGSTOP if fault == "stop a rank" else signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError):
            return
        self.record.faults[fault] += 1

    def _send_garbage(self, *, whole: bool) -> None:
        import zmq

        path = str(RuntimeDir(self._folder / "run").client_socket)
        size = self._rng.choice((0, 1, 100, 10_000, 1_000_000))
        noise = self._rng.randbytes(size)
        if not whole:
            with socket.socket(socket.AF_UNIX) as peer, contextlib.suppress(OSError):
                peer.connect(path)
                peer.sendall(noise)
            return
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(f"ipc://{path}")
            for _ in range(self._rng.randint(1, 8)):
                dealer.send(noise)
            if not dealer.poll(5000):
                self.record.unanswered_status += 1
                self.record.notes.append(f"{size} bytes of garbage were not answered within 5 s")

    # --- Looking

    def _status(self) -> DaemonStatus | None:
        try:
            with Client(self._folder / "run", name="soak") as client:
                return client.status(deadline_s=5.0)
        except XditdError as error:
            self.record.unanswered_status += 1
            self.record.notes.append(f"status: {error}")
            return None

    def _sample(self, elapsed_s: float, minutes: float) -> None:
        status = self._status()
        held = holdings_of(self._daemon.pid)
        with self._lock:
            record = self.record
            record.samples.append((elapsed_s, held.rss_bytes))
            words = [
                f"{elapsed_s:5.0f}/{minutes * 60:.0f} s",
                f"right {record.right}  wrong {record.wrong}  typed errors {sum(record.errors.values())}",
                f"hangs {record.hangs}  faults {sum(record.faults.values())}",
                f"group {status.group_state.value if status else '?'}",
                f"fds {held.fds}  RSS {held.rss_bytes / 2**20:.1f} MiB",
            ]
            print("  ".join(words), file=sys.stderr, flush=True)

    def _settle(self) -> Holdings:
        """Wait until a ready group holds nothing of anybody, and say what is open then."""
        ends = time.monotonic() + JOB_DEADLINE_S
        while time.monotonic() < ends and self._daemon.poll() is None:
            status = self._status()
            if (
                status is not None
                and status.group_state is GroupState.READY
                and not status.components
                and not status.jobs
                and status.clients == 1
            ):
                time.sleep(0.5)  # the connection of this very look closes, too
                held = holdings_of(self._daemon.pid)
                if not held.segments:
                    return held
            time.sleep(0.5)
        self.record.notes.append("the daemon did not come to rest")
        return holdings_of(self._daemon.pid) if self._daemon.poll() is None else Holdings(0, 0, 0, 0)


def slope_bytes_per_minute(samples: list[tuple[float, int]]) -> float:
    """Least squares over the second half, when everything has been loaded once."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    mean_t = sum(t for t, _ in half) / len(half)
    mean_y = sum(y for _, y in half) / len(half)
    spread = sum((t - mean_t) ** 2 for t, _ in half)
    return 60 * sum((t - mean_t) * (y - mean_y) for t, y in half) / spread


def judge(record: Record, before: Holdings, after: Holdings, minutes: float) -> tuple[dict[str, Any], list[str]]:
    """The figures, and which of them must not be as they are."""
    slope = slope_bytes_per_minute(record.samples)
    figures: dict[str, Any] = {
        "right images": record.right,
        "wrong images": record.wrong,
        "lends": record.lends,
        "hangs": record.hangs,
        "requests lost without a typed error": record.untyped,
        "unanswered status requests": record.unanswered_status,
        "slowest answer (s)": round(record.slowest_s, 1),
        "typed errors": dict(sorted(record.errors.items())),
        "faults": dict(sorted(record.faults.items())),
        "daemon descriptors (before, after)": [before.fds, after.fds],
        "processes (before, after)": [before.processes, after.processes],
        "mapped segments left": after.segments,
        "daemon RSS (MiB; before, after)": [round(held.rss_bytes / 2**20, 1) for held in (before, after)],
        "daemon RSS slope (KiB/min)": round(slope / 1024, 1),
    }
    faults = [
        name
        for name in ("wrong images", "hangs", "requests lost without a typed error", "unanswered status requests")
        if figures[name]
    ]
    faults += ["mapped segments left"] if after.segments else []
    faults += ["daemon descriptors"] if after.fds > before.fds + 2 else []
    faults += ["processes"] if after.processes != before.processes else []
    faults += ["right images: too few"] if record.right < CLIENTS else []
    faults += ["daemon RSS"] if after.rss_bytes > before.rss_bytes + RSS_GROWTH_BYTES else []
    if minutes >= SLOPE_MINUTES and slope > RSS_SLOPE_BYTES_PER_MINUTE:
        faults.append("daemon RSS slope")
    faults += [note for note in record.notes if note.startswith("the daemon")]
    return figures, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    parser.add_argument("--log", type=Path, help="keep the daemon's log here")
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        run_client(options.client, options.folder, options.seed)
        return 0
    soak = Soak(options.seed)
    try:
        before = soak.prepare()
        soak.run(options.minutes)
        after = soak.finish()
        if options.log:
            soak.keep_log(options.log)
    finally:
        soak.close()
    figures, faults = judge(soak.record, before, after, options.minutes)
    if options.json:
        found = {"minutes": options.minutes, "seed": options.seed, **figures, "failed": faults}
        print(json.dumps({**found, "notes": soak.record.notes, "machine": describe_machine()}, indent=1))
    else:
        width = max(map(len, figures))
        for name, value in figures.items():
            print(f"{name:<{width}}  {value}")
        for note in soak.record.notes[:40]:
            print(f"note: {note}")
        print(f"FAILED: {'; '.join(faults)}" if faults else "passed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
