"""Faults of processes: kill, stop or pause them, and send garbage to the socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterable

import zmq
from faults import Broken, Fault, NotNow, Pace, StressRun
from process_tree import descendants, is_running, parent_of
from record import is_lost
from target import START_S, is_up

from xditd.ipc.addresses import endpoint
from xditd.ipc.status import GroupState

ANSWER_S = 5.0
PAUSES_S = (2.0, 15.0)
"""Shortest and longest pause. Long ones are likelier, because the daemon could take one beyond the hang deadline for
a hang."""
AFTER_PAUSE_S = 30.0
RIGHT_AFTER_PAUSE = 8
"""Errors of a pause are looked for until this many right results, or this many seconds, after it."""
WORKERS_DIE_S = 10.0


def find_ranks(stress: StressRun) -> list[int]:
    """Return the pids of the ranks.

    Raises:
        NotNow: the ranks are being started.
    """
    status = stress.target.find_status()
    if status is None or not is_up(status) or not status.workers:
        raise NotNow
    return [worker.pid for worker in status.workers]


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_rank(stress: StressRun) -> None:
    send_signal([stress.rng.choice(find_ranks(stress))], signal.SIGKILL)


def kill_leader(stress: StressRun) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        send_signal([parent_of(find_ranks(stress)[0])], signal.SIGKILL)


def stop_rank(stress: StressRun) -> None:
    send_signal([stress.rng.choice(find_ranks(stress))], signal.SIGSTOP)


def kill_rank_without_folder(stress: StressRun) -> None:
    """Delete the daemon's working folder, then kill a rank: the group must come up again."""
    ranks = find_ranks(stress)
    starts = stress.target.ask().counters.group_starts
    shutil.rmtree(stress.target.working_folder, ignore_errors=True)
    send_signal([stress.rng.choice(ranks)], signal.SIGKILL)
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        status = stress.target.find_status()
        if status is not None and status.group_state is GroupState.GIVEN_UP:
            raise Broken(f"the group was given up after a rank's death: {status.group_detail}")
        if status is not None and status.counters.group_starts > starts and is_up(status):
            return
        time.sleep(0.2)  # between two polls
    raise Broken(f"the group did not come up within {START_S:.0f} s of a rank's death")


def pause_all(stress: StressRun) -> None:
    """Pause daemon, leader, ranks and clients for some seconds, like a laptop that sleeps."""
    daemon = stress.target.process.pid
    pause(stress, [daemon, *descendants(daemon), *stress.clients.pids])


def pause_daemon(stress: StressRun) -> None:
    """Pause only the daemon, like a debugger; workers and clients run, but no session can be opened."""
    stress.record.expect_daemon_gone(PAUSES_S[1] + ANSWER_S)
    pause(stress, [stress.target.process.pid], may_fail="session")


def pause(stress: StressRun, pids: list[int], may_fail: str = "") -> None:
    """Stop these processes for some seconds.

    Raises:
        Broken: a request was lost, other than of the action ``may_fail``, or the group was rebuilt.
    """
    find_ranks(stress)
    starts = stress.target.ask().counters.group_starts
    began, right, lasts_s = time.monotonic(), stress.record.right, stress.rng.triangular(*PAUSES_S, PAUSES_S[1])
    stress.rng.shuffle(pids)
    send_signal(pids, signal.SIGSTOP)
    time.sleep(lasts_s)  # the fault itself
    stress.rng.shuffle(pids)
    send_signal(pids, signal.SIGCONT)
    ends = time.monotonic() + AFTER_PAUSE_S
    while time.monotonic() < ends and stress.record.right < right + RIGHT_AFTER_PAUSE:
        time.sleep(0.2)  # between two polls
    lost = [error for error in stress.record.errors_since(began) if is_lost(error) and error.action != may_fail]
    rebuilt = stress.target.ask().counters.group_starts - starts
    if rebuilt or lost:
        first = [f"{error.action}: {error.code}: {error.detail}" for error in lost[:3]]
        raise Broken(f"after {lasts_s:.1f} s, {rebuilt} rebuilds and {len(lost)} requests lost: {'; '.join(first)}")


def kill_daemon(stress: StressRun) -> None:
    """Kill the daemon: its workers must end too, and the next daemon must serve in the same folder."""
    find_ranks(stress)
    target = stress.target
    below = descendants(target.process.pid)
    stress.record.expect_daemon_gone(START_S)
    target.process.kill()
    target.process.wait()
    ends = time.monotonic() + WORKERS_DIE_S
    while left := [pid for pid in below if is_running(pid)]:
        if time.monotonic() > ends:
            send_signal(left, signal.SIGKILL)
            raise Broken(f"{len(left)} processes outlived the daemon by {WORKERS_DIE_S:.0f} s")
        time.sleep(0.1)  # between two polls
    target.start()
    target.wait_ready()


def kill_client(stress: StressRun) -> None:
    stress.clients.kill_one()


def send_garbage(stress: StressRun) -> None:
    """Send messages of random bytes; each must be answered."""
    noise = make_noise(stress)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(endpoint(stress.target.runtime.client_socket))
        for _ in range(stress.rng.randint(1, 8)):
            dealer.send(noise)
        if not dealer.poll(int(ANSWER_S * 1000)):
            raise Broken(f"{len(noise)} bytes of garbage were not answered within {ANSWER_S:.0f} s")


def send_half_greeting(stress: StressRun) -> None:
    """Send random bytes in place of ZMTP's greeting."""
    noise = make_noise(stress)
    with socket.socket(socket.AF_UNIX) as peer, contextlib.suppress(OSError):
        peer.connect(str(stress.target.runtime.client_socket))
        peer.sendall(noise)


def make_noise(stress: StressRun) -> bytes:
    return stress.rng.randbytes(stress.rng.choice((0, 1, 100, 10_000, 1_000_000)))


FAULTS = (
    Fault("garbage", Pace.LIGHT, "each message is answered", send_garbage, weight=4),
    Fault("half-greeting", Pace.LIGHT, "no effect on others", send_half_greeting, weight=2),
    Fault("kill-client", Pace.LIGHT, "its jobs and loans end; others are served", kill_client),
    Fault("kill-rank", Pace.HEAVY, "jobs end as workers_lost; the group is rebuilt", kill_rank),
    Fault("kill-leader", Pace.HEAVY, "as above", kill_leader),
    Fault("stop-rank", Pace.HEAVY, "as above, after the hang deadline", stop_rank),
    Fault(
        "kill-rank-without-folder",
        Pace.HEAVY,
        "as above, when the daemon's working folder is gone",
        kill_rank_without_folder,
    ),
    Fault("kill-daemon", Pace.HEAVY, "its workers die with it; the next daemon serves in the same folder", kill_daemon),
    Fault("pause", Pace.HEAVY, "daemon, workers and clients stopped for up to 15 s: no job is lost", pause_all),
    Fault("pause-daemon", Pace.HEAVY, "the daemon alone stopped for up to 15 s: no job is lost", pause_daemon),
)
