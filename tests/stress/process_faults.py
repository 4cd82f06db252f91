"""Faults of processes: killed, stopped, paused all together; and garbage on the socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterable

import zmq
from faults import Broken, Fault, NotNow, Pace, Scene
from process_tree import descendants, is_running, parent_of
from record import is_lost
from target import START_S, is_up

from xditd.ipc.addresses import endpoint
from xditd.ipc.status import GroupState

ANSWER_S = 5.0
PAUSES_S = (2.0, 15.0)
"""Long ones are likelier: those beyond the hang deadline are the ones that could be taken for a hang."""
AFTER_PAUSE_S = 30.0
RIGHT_AFTER_PAUSE = 8
"""A pause is over when so many results came, or so long after it: by then its errors show."""
WORKERS_DIE_S = 10.0


def find_ranks(scene: Scene) -> list[int]:
    """The pids of the ranks.

    Raises:
        NotNow: there are none; they are being started.
    """
    status = scene.target.find_status()
    if status is None or not is_up(status) or not status.workers:
        raise NotNow
    return [worker.pid for worker in status.workers]


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_rank(scene: Scene) -> None:
    send_signal([scene.rng.choice(find_ranks(scene))], signal.SIGKILL)


def kill_leader(scene: Scene) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        send_signal([parent_of(find_ranks(scene)[0])], signal.SIGKILL)


def stop_rank(scene: Scene) -> None:
    send_signal([scene.rng.choice(find_ranks(scene))], signal.SIGSTOP)


def kill_rank_without_folder(scene: Scene) -> None:
    """Delete the folder that the daemon was started in, then kill a rank: the group must come up again."""
    ranks = find_ranks(scene)
    starts = scene.target.ask().counters.group_starts
    shutil.rmtree(scene.target.working_folder, ignore_errors=True)
    send_signal([scene.rng.choice(ranks)], signal.SIGKILL)
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        status = scene.target.find_status()
        if status is not None and status.group_state is GroupState.GIVEN_UP:
            raise Broken(f"the group was given up after a rank's death: {status.group_detail}")
        if status is not None and status.counters.group_starts > starts and is_up(status):
            return
        time.sleep(0.2)  # between two looks
    raise Broken(f"the group did not come up within {START_S:.0f} s of a rank's death")


def pause_all(scene: Scene) -> None:
    """Stop daemon, leader, ranks and clients for a while, as a laptop that sleeps; then let all go on."""
    daemon = scene.target.process.pid
    pause(scene, [daemon, *descendants(daemon), *scene.crowd.pids])


def pause_daemon(scene: Scene) -> None:
    """Stop the daemon alone, as a debugger does; workers and clients go on, but no session can be opened meanwhile."""
    scene.record.expect_daemon_gone(PAUSES_S[1] + ANSWER_S)
    pause(scene, [scene.target.process.pid], may_fail="session")


def pause(scene: Scene, pids: list[int], may_fail: str = "") -> None:
    """Stop these processes for a while.

    Raises:
        Broken: a request other than the deed ``may_fail`` was lost by it, or the group was rebuilt.
    """
    find_ranks(scene)
    starts = scene.target.ask().counters.group_starts
    began, right, lasts_s = time.monotonic(), scene.record.right, scene.rng.triangular(*PAUSES_S, PAUSES_S[1])
    scene.rng.shuffle(pids)
    send_signal(pids, signal.SIGSTOP)
    time.sleep(lasts_s)  # the fault itself
    scene.rng.shuffle(pids)
    send_signal(pids, signal.SIGCONT)
    ends = time.monotonic() + AFTER_PAUSE_S
    while time.monotonic() < ends and scene.record.right < right + RIGHT_AFTER_PAUSE:
        time.sleep(0.2)  # between two looks
    lost = [error for error in scene.record.errors_since(began) if is_lost(error) and error.deed != may_fail]
    rebuilt = scene.target.ask().counters.group_starts - starts
    if rebuilt or lost:
        words = [f"{error.deed}: {error.code}: {error.detail}" for error in lost[:3]]
        raise Broken(f"after {lasts_s:.1f} s, {rebuilt} rebuilds and {len(lost)} requests lost: {'; '.join(words)}")


def kill_daemon(scene: Scene) -> None:
    """Kill the daemon: its workers die with it, and the next one takes over what it left in the folder."""
    find_ranks(scene)
    target = scene.target
    below = descendants(target.process.pid)
    scene.record.expect_daemon_gone(START_S)
    target.process.kill()
    target.process.wait()
    ends = time.monotonic() + WORKERS_DIE_S
    while left := [pid for pid in below if is_running(pid)]:
        if time.monotonic() > ends:
            send_signal(left, signal.SIGKILL)
            raise Broken(f"{len(left)} processes outlived the daemon by {WORKERS_DIE_S:.0f} s")
        time.sleep(0.1)  # between two looks
    target.start()
    target.wait_ready()


def kill_client(scene: Scene) -> None:
    scene.crowd.kill_one()


def send_garbage(scene: Scene) -> None:
    """Whole messages of noise, each of which is answered."""
    noise = make_noise(scene)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(endpoint(scene.target.runtime.client_socket))
        for _ in range(scene.rng.randint(1, 8)):
            dealer.send(noise)
        if not dealer.poll(int(ANSWER_S * 1000)):
            raise Broken(f"{len(noise)} bytes of garbage were not answered within {ANSWER_S:.0f} s")


def send_half_greeting(scene: Scene) -> None:
    """Noise where a connection begins."""
    noise = make_noise(scene)
    with socket.socket(socket.AF_UNIX) as peer, contextlib.suppress(OSError):
        peer.connect(str(scene.target.runtime.client_socket))
        peer.sendall(noise)


def make_noise(scene: Scene) -> bytes:
    return scene.rng.randbytes(scene.rng.choice((0, 1, 100, 10_000, 1_000_000)))


FAULTS = (
    Fault("garbage", Pace.LIGHT, "each message is answered", send_garbage, weight=4),
    Fault("half-greeting", Pace.LIGHT, "nobody notices", send_half_greeting, weight=2),
    Fault("kill-client", Pace.LIGHT, "its jobs and loans end; others are served", kill_client),
    Fault("kill-rank", Pace.HEAVY, "jobs end as workers_lost; the group is rebuilt", kill_rank),
    Fault("kill-leader", Pace.HEAVY, "as above", kill_leader),
    Fault("stop-rank", Pace.HEAVY, "as above, after the hang deadline", stop_rank),
    Fault(
        "kill-rank-without-folder",
        Pace.HEAVY,
        "as above, when the folder that the daemon was started in is gone",
        kill_rank_without_folder,
    ),
    Fault("kill-daemon", Pace.HEAVY, "its workers die with it; the next daemon serves in the same folder", kill_daemon),
    Fault("pause", Pace.HEAVY, "daemon, workers and clients stopped for up to 15 s: no job is lost", pause_all),
    Fault("pause-daemon", Pace.HEAVY, "the daemon alone stopped for up to 15 s: no job is lost", pause_daemon),
)
