"""Descriptors, memory and /dev/shm that run out: a typed error for the one request, and no half-plugged component."""

from __future__ import annotations

import resource

import pytest
import torch

from xditd.client import OutOfMemory
from xditd.client.demo import checkpoints


def test_one_rank_that_cannot_open_what_is_lent(client, files, make_inputs, run, processes):
    """The other one is prepared by then; neither may serve it."""
    pid = client.status().workers[1].pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (processes.count_fds(pid), before[1]))
    try:
        with pytest.raises(OutOfMemory, match="Too many open files"):
            client.lend(files.tuned)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert [worker.loaded for worker in client.status().workers] == [1, 1]
    with client.lend(files.tuned) as loan:  # the same request works once there is room
        assert torch.isfinite(run(client, loan, make_inputs())).all()


@pytest.mark.long
@pytest.mark.slow
def test_one_rank_without_memory(start_daemon, files, make_inputs, run, seed_bits, start_script):
    """The host's memory stands for a GPU's: one rank may not take what the job needs, and the other one could.

    The workers are new: memory that earlier jobs gave back would be room enough.
    """
    daemon = start_daemon(2)
    daemon.wait_ready()
    client = daemon.connect()
    child = start_script(
        """
        import sys, torch
        from xditd.client import Client, XditdError
        client = Client(sys.argv[1])
        loan = client.lend(sys.argv[2])
        text = {"prompt_embeds": torch.randn(1, 512, 4096), "pooled_prompt_embeds": torch.randn(1, 768)}
        for side in (256, 1024):
            try:
                client.generate(loan, text, height=side, width=side, steps=1, seed=1).result()
                print("done", flush=True)
            except XditdError as error:
                print(error.code, flush=True)
            sys.stdin.readline()
        """,
        daemon.runtime_dir,
        files.tuned,
    )
    assert child.stdout.readline() == "done\n"
    pid = client.status().workers[1].pid
    with open(f"/proc/{pid}/statm", encoding="utf-8") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.prlimit(pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    child.stdin.write("again\n")
    child.stdin.flush()
    outcome = child.stdout.readline()
    if pid in {worker.pid for worker in client.status().workers}:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert outcome == "out_of_memory\n"
    child.kill()
    with client, client.lend(files.transformer) as loan:
        assert torch.equal(run(client, loan, make_inputs(seed=5)), seed_bits)
    daemon.stop()


def test_a_client_without_memory(daemon, good_job, start_script):
    """Its own allocation fails; the daemon hears nothing of it."""
    child = start_script(
        """
        import resource, sys
        from xditd.client import Client, OutOfMemory
        from xditd.client.demo import checkpoints
        client = Client(sys.argv[1])
        state = checkpoints.flux1_state_dict(2)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**20, resource.RLIM_INFINITY))
        try:
            client.lend(state)
        except OutOfMemory as error:
            print(error.code, flush=True)
        """,
        daemon.runtime_dir,
    )
    assert child.stdout.readline() == "out_of_memory\n"


@pytest.mark.slow
@pytest.mark.long
def test_a_full_dev_shm(start_daemon, files, make_inputs, run, seed_bits):
    """Shared memory here is memfds, which need no room in /dev/shm: daemon, ranks and client work without."""
    tiny = 'mount -t tmpfs -o size=16k tmpfs /dev/shm && ! head -c 1M /dev/zero > /dev/shm/full 2>&1 && exec "$@"'
    full = start_daemon(2, before=["unshare", "-m", "sh", "-c", tiny, "sh"])
    full.wait_ready()
    with open(f"/proc/{full.process.pid}/mountinfo", encoding="utf-8") as mounts:
        if "size=16k" not in mounts.read():
            pytest.skip("needs a mount namespace of its own (root)")
    with full.connect() as client, client.lend(checkpoints.flux1_state_dict(1)) as loan:
        assert [tier.value for tier in loan.tiers] == ["host_shm"]
        assert torch.equal(run(client, loan, make_inputs(seed=5)), seed_bits)
    full.stop()
