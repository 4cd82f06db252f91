"""Stress client process: lends, generates, and injects faults into its own files, jobs and loans.

It runs until it is killed, and prints a line of JSON for everything that begins or ends
(:meth:`record.Record.add_event` reads them).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
from record import DAEMON_GONE, EXPECTED, JOB_DEADLINE_S

from xditd.client import Client, GenerationJob, Loan, WorkersUnavailable, XditdError
from xditd.client.demo.flux1_calls import Flux1Calls, Prompt

MANY_STEPS = 1000
"""Steps of a job that is ended early; it runs longer than a pause of the daemon, during which no cancel arrives."""
PAUSE_S = 0.5
"""Time between two attempts while there is no daemon, or no workers."""


class SessionEnds(Exception):
    """The client has to open a new session; the reason has been reported."""


class StressClient:
    """Opens sessions, lends and runs jobs; ``actions`` names the faults that this client may inject."""

    def __init__(self, number: int, folder: Path, runtime: Path, seed: int, actions: list[str]) -> None:
        self._number, self._folder, self._runtime = number, folder, runtime
        self._rng = random.Random(seed)
        self._oracle = oracle.Oracle(folder)
        file_actions: dict[str, Callable[[Client], None]] = {
            "rewrite-file": self._rewrite_file,
            "touch-inode": self._touch_inode,
            "nan-weight": self._lend_not_finite,
        }
        self._file_actions = [action for name, action in file_actions.items() if name in actions]
        weights = {"finish": 12, "cancel": 3, "return": 1, "leave": 1}
        self._job_actions = {name: weight for name, weight in weights.items() if name == "finish" or name in actions}

    def run(self) -> None:
        """Open one session after the other, for ever."""
        while True:
            with (
                contextlib.suppress(SessionEnds),
                self._attempt("session"),
                Client(self._runtime, name=f"stress-{self._number}") as client,
            ):
                self._report(ends="session")
                for _ in range(self._rng.randint(2, 6)):
                    self._work(client)

    def _work(self, client: Client) -> None:
        """Run some jobs on one loan, or one fault of a file."""
        if self._file_actions and self._rng.random() < 0.4:
            self._rng.choice(self._file_actions)(client)
            return
        checkpoint = self._rng.choice(oracle.CHECKPOINTS)
        loan = self._lend(client, oracle.checkpoint_path(self._folder, checkpoint))
        for _ in range(self._rng.randint(1, 4)):
            action = self._rng.choices(list(self._job_actions), list(self._job_actions.values()))[0]
            with self._attempt(action):
                if action == "finish":
                    self._finish(client, loan, checkpoint)
                else:
                    self._end_in_mid_job(client, loan, action)
            if action == "return":
                return
        loan.return_(deadline_s=JOB_DEADLINE_S)

    # --- Jobs

    def _lend(self, client: Client, path: Path) -> Loan:
        self._report(begins="lend")
        began = time.monotonic()
        with self._attempt("lend"):
            loan = client.lend(path, deadline_s=JOB_DEADLINE_S)
            self._report(ends="lend", took_s=time.monotonic() - began)
            return loan
        raise SessionEnds

    def _finish(self, client: Client, loan: Loan, checkpoint: str) -> None:
        """Run a job to its end, and compare its result."""
        seed = self._rng.choice(oracle.SEEDS)
        self._check_result(oracle.start_job(client, loan, seed, deadline_s=JOB_DEADLINE_S), checkpoint, seed, "finish")

    def _check_result(self, job: GenerationJob, checkpoint: str, seed: int, action: str) -> None:
        self._report(begins="job")
        began = time.monotonic()
        is_right = self._oracle.is_right(checkpoint, seed, job.result().latents)
        detail = f"{action}: checkpoint {checkpoint}, seed {seed}: other bits than before the first fault"
        self._report(ends="right" if is_right else "wrong", took_s=time.monotonic() - began, detail=detail)

    def _end_in_mid_job(self, client: Client, loan: Loan, action: str) -> None:
        """Start a long job, wait until it runs, and cancel it, return its loan or leave the session."""
        self._report(begins="job")
        job = oracle.start_job(client, loan, 0, steps=MANY_STEPS, deadline_s=JOB_DEADLINE_S)
        self._wait_for_step(job)
        self._report(ends="did", action=action)
        if action == "leave":
            raise SessionEnds
        if action == "return":
            loan.return_(deadline_s=JOB_DEADLINE_S)
        else:
            job.cancel()
        job.result()
        self._report(ends="broken", action=action, detail="the job ended as done")

    def _wait_for_step(self, job: GenerationJob) -> None:
        self._events = iter(job)  # kept: dropping the iterator cancels the job
        next(self._events, None)

    # --- Files

    def _rewrite_file(self, client: Client) -> None:
        """Overwrite a lent file in place with another of its size, and restore its mtime, as copy tools do."""
        lent, other = self._rng.sample(oracle.CHECKPOINTS, 2)
        path = self._copy(lent)
        loan = self._lend(client, path)
        self._finish(client, loan, lent)
        seed, in_mid_job = self._rng.choice(oracle.SEEDS), self._rng.random() < 0.5
        with self._attempt("rewrite-file"):
            if in_mid_job:
                job = oracle.start_job(client, loan, seed, deadline_s=JOB_DEADLINE_S)
                self._wait_for_step(job)
            overwrite(path, oracle.checkpoint_path(self._folder, other))
            self._report(ends="did", action="rewrite-file")
            if not in_mid_job:
                job = oracle.start_job(client, loan, seed, deadline_s=JOB_DEADLINE_S)
            # Only a job that read the weights before they were overwritten may succeed.
            self._check_result(job, lent, seed, "rewrite-file")
        loan.return_(deadline_s=JOB_DEADLINE_S)
        self._lend_again(client, path, other)

    def _touch_inode(self, client: Client) -> None:
        """Change a lent file's inode: ctime changes, the bytes do not."""
        lent = self._rng.choice(oracle.CHECKPOINTS)
        path = self._copy(lent)
        loan = self._lend(client, path)
        self._finish(client, loan, lent)
        self._rng.choice((change_mode, link_and_unlink, rename))(path)
        self._report(ends="did", action="touch-inode")
        seed = self._rng.choice(oracle.SEEDS)
        with self._attempt("touch-inode"):
            job = oracle.start_job(client, loan, seed, deadline_s=JOB_DEADLINE_S)
            self._check_result(job, lent, seed, "touch-inode")
        loan.return_(deadline_s=JOB_DEADLINE_S)
        self._lend_again(client, path, lent)

    def _lend_not_finite(self, client: Client) -> None:
        """Run each kind of job on a checkpoint with one NaN: none may succeed."""
        with self._attempt("nan-weight"):
            loan = self._lend(client, oracle.checkpoint_path(self._folder, oracle.NOT_FINITE))
            self._report(ends="did", action="nan-weight")
            for kind, start in {
                "generate": lambda: oracle.start_job(client, loan, 0, deadline_s=JOB_DEADLINE_S).result(),
                "generate with a VAE": lambda: self._decode_not_finite(client, loan),
                "call": lambda: Flux1Calls(client, loan).predict(
                    oracle.latents_for(0), 0.5, Prompt(**oracle.conditioning_for(0)), deadline_s=JOB_DEADLINE_S
                ),
            }.items():
                self._report(begins="job")
                with self._attempt("nan-weight"):
                    start()
                    self._report(ends="broken", action="nan-weight", detail=f"{kind}: a success on weights with a NaN")
            loan.return_(deadline_s=JOB_DEADLINE_S)

    def _decode_not_finite(self, client: Client, loan: Loan) -> None:
        with client.lend(oracle.checkpoint_path(self._folder, oracle.VAE), deadline_s=JOB_DEADLINE_S) as vae:
            oracle.start_job(client, loan, 0, vae=vae, deadline_s=JOB_DEADLINE_S).result()

    def _lend_again(self, client: Client, path: Path, checkpoint: str) -> None:
        loan = self._lend(client, path)
        self._finish(client, loan, checkpoint)
        loan.return_(deadline_s=JOB_DEADLINE_S)

    def _copy(self, checkpoint: str) -> Path:
        copy = self._folder / f"of-client-{self._number}.safetensors"
        oracle.copy_checkpoint(self._folder, checkpoint, copy)
        return copy

    # --- Reports

    @contextlib.contextmanager
    def _attempt(self, action: str) -> Iterator[None]:
        """Report a typed error of the block.

        Raises:
            SessionEnds: the error is not one that the action expects, and its loan may be lost.
        """
        self._report(begins=action)
        began = time.monotonic()
        try:
            yield
        except XditdError as error:
            took_s = time.monotonic() - began
            self._report(ends="error", action=action, code=error.code, took_s=took_s, detail=str(error)[:300])
            if error.code in DAEMON_GONE or error.code == WorkersUnavailable.code:
                time.sleep(PAUSE_S)
            elif error.retryable or error.code in EXPECTED.get(action, ()):
                return
            raise SessionEnds from error

    def _report(self, **event: Any) -> None:
        print(json.dumps(event), flush=True)


def overwrite(path: Path, source: Path) -> None:
    """Overwrite the file at ``path`` in place with the bytes of ``source``, and restore its times."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(source.read_bytes())
    after = path.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_mode(path: Path) -> None:
    path.chmod(0o640)


def link_and_unlink(path: Path) -> None:
    """Make a hard link to the file and remove it, as backup tools do."""
    link = path.with_suffix(".link")
    link.unlink(missing_ok=True)
    link.hardlink_to(path)
    link.unlink()


def rename(path: Path) -> None:
    """Move the file away and back."""
    path.rename(path.with_suffix(".moved")).rename(path)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runtime", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--actions", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    StressClient(options.number, options.folder, options.runtime, options.seed, options.actions).run()


if __name__ == "__main__":
    main()
