"""Two GPUs: faults of one of them, or of the process that lends, end in a typed error and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import torch

from xditd.client import Cancelled, DaemonUnreachable, ForeignGpu, LeaseLost, NotFinite, OutOfMemory, WorkersLost
from xditd.client.arenas import Arena
from xditd.client.demo import checkpoints
from xditd.client.demo.flux1_calls import Flux1Calls

pytestmark = pytest.mark.multigpu

MIB = 2**20
GPUS = (0, 1)

LARGE = {"heads": 16, "double_blocks": 4, "single_blocks": 4}
"""More than 1,000 MiB in bfloat16: a copy that stays behind cannot hide among workspaces."""

ROOM_MIB = 256
"""Kernels, workspaces and NCCL's buffers, which a rebuilt group may hold in another number."""


def free_bytes(gpu: int) -> int:
    torch.cuda.synchronize(gpu)
    return torch.cuda.mem_get_info(gpu)[0]


def free_on_all() -> list[int]:
    return [free_bytes(gpu) for gpu in GPUS]


def is_back(before: list[int], room_mib: int = ROOM_MIB) -> bool:
    """Whether every GPU has as much free memory as before."""
    return all(then - now < room_mib * MIB for then, now in zip(before, free_on_all(), strict=True))


def take_all_but(room_mib: int, gpu: int) -> torch.Tensor:
    """Another program's memory, which leaves ``room_mib`` on a GPU."""
    torch.cuda.empty_cache()
    return torch.empty(free_bytes(gpu) - room_mib * MIB, dtype=torch.uint8, device=f"cuda:{gpu}")


@pytest.fixture(scope="module")
def daemon(start_daemon):
    """Two workers on two GPUs. Its deadline is for the test that stops a rank; a first step takes a few seconds."""
    started = start_daemon(2, "cuda", flags=["--hang-deadline-s", "30"])
    started.wait_ready()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return checkpoints.flux1_state_dict(1, dtype=torch.bfloat16, **LARGE)


@pytest.fixture
def make_arena() -> Iterator[Callable[..., Arena]]:
    """Copy tensors into an arena on a GPU. What a test leaves of it is freed, so that a failure stays its own."""
    made: list[Arena] = []

    def make(state, device: str = "cuda:0") -> Arena:
        made.append(Arena.copy_of(state, device))
        return made[-1]

    yield make
    for arena in made:
        arena.close()


@pytest.fixture
def arena(state) -> Iterator[Arena]:
    arena = Arena.copy_of(state, "cuda:0")
    yield arena
    arena.close()


@pytest.fixture
def loan(client, arena):
    with client.lend(arena.tensors) as loan:
        yield loan


@pytest.fixture(autouse=True)
def unharmed(client, loan, make_inputs, run, wait_until) -> Iterator[None]:
    """After each test: the same bits again, and the memory of both GPUs back."""
    inputs = make_inputs(seed=5)
    expected = run(client, loan, inputs)
    before = free_on_all()
    yield
    torch.cuda.empty_cache()
    assert torch.equal(run(client, loan, inputs), expected)  # waits for a group that is being rebuilt
    wait_until(lambda: is_back(before), f"memory to come back: {before} was free")


@pytest.fixture
def long_job(client, loan, make_inputs) -> Callable[..., tuple[object, object]]:
    """Start a job that only a fault ends soon, and wait until it runs."""

    def start(by=client, component=loan):
        inputs = make_inputs(pixels=512)
        job = by.generate(component, inputs.conditioning, height=512, width=512, steps=1000, seed=1)
        events = iter(job)
        next(events)
        return job, events  # the iterator is kept: dropping it cancels its job

    return start


@pytest.fixture
def exporter(daemon) -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    """Start a process that lends an arena on the first GPU; returns it and the component's id."""
    children: list[subprocess.Popen[str]] = []
    script = textwrap.dedent("""
        import sys, torch
        from xditd.client import Client
        from xditd.client.arenas import Arena
        from xditd.client.demo import checkpoints
        shape = {"heads": 16, "double_blocks": 4, "single_blocks": 4}
        arena = Arena.copy_of(checkpoints.flux1_state_dict(2, dtype=torch.bfloat16, **shape), "cuda:0")
        client = Client(sys.argv[1])
        loan = client.lend(arena.tensors)
        print(loan.component_id, flush=True)
        sys.stdin.read()
    """)

    def start() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", script, str(daemon.runtime_dir)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        component_id = child.stdout.readline().strip()
        assert component_id
        return child, component_id

    yield start
    for child in children:
        child.kill()
        child.wait()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.close()
        child.stdout.close()


def test_the_second_gpu_gets_one_copy_and_gives_it_back(client, loan, arena, make_arena):
    assert loan.copied.total == loan.copied.peer == arena.size_bytes
    before = free_on_all()
    other = make_arena(dict(arena.tensors))
    with client.lend(other.tensors):
        taken = [then - now for then, now in zip(before, free_on_all(), strict=True)]
        assert arena.size_bytes <= taken[0] < arena.size_bytes + 64 * MIB  # the arena itself, and no second copy
        assert arena.size_bytes <= taken[1] < arena.size_bytes + 64 * MIB  # the one copy
    assert before[1] - free_bytes(1) < 64 * MIB
    other.close()
    assert is_back(before, 64)


def test_one_gpu_without_room_for_its_copy(client, make_inputs, run, make_arena):
    """The other rank is prepared by then; neither may serve it, and nothing of it stays mapped."""
    other = make_arena(checkpoints.flux1_state_dict(2, dtype=torch.bfloat16, **LARGE))
    workers = [worker.pid for worker in client.status().workers]
    free = free_on_all()
    hog = take_all_but(300, gpu=1)
    with pytest.raises(OutOfMemory):
        client.lend(other.tensors)
    del hog
    torch.cuda.empty_cache()
    assert is_back(free, 64)
    assert [worker.loaded for worker in client.status().workers] == [1, 1]
    with client.lend(other.tensors) as loan:  # the same lend works once there is room
        assert loan.copied.peer == other.size_bytes
        assert torch.isfinite(run(client, loan, make_inputs()).float()).all()
    other.close()
    assert [worker.pid for worker in client.status().workers] == workers  # nobody had to be rebuilt


def test_one_gpu_without_room_for_a_job(client, loan, make_inputs, run):
    """One rank leaves a collective that the other one waits in: the group is rebuilt, the loan mapped again."""
    before = client.status()
    hog = take_all_but(400, gpu=1)
    with pytest.raises(OutOfMemory):  # 131,072 image tokens a rank: its inputs fit, an activation takes 512 MiB
        run(client, loan, make_inputs(tokens=512, pixels=8192), steps=1)
    del hog
    torch.cuda.empty_cache()
    run(client, loan, make_inputs())
    after = client.status()
    assert after.counters.group_starts == before.counters.group_starts + 1
    assert not {worker.pid for worker in before.workers} & {worker.pid for worker in after.workers}


def test_a_weight_that_is_not_finite_is_named_by_both(client, arena, make_inputs, run, make_arena):
    broken = make_arena({**arena.tensors, "img_in.bias": torch.full_like(arena.tensors["img_in.bias"], torch.nan)})
    inputs = make_inputs()
    with client.lend(broken.tensors, label="weights") as loan:
        with pytest.raises(NotFinite, match=r"\(weights\): latents after step 1 of 4"):
            run(client, loan, inputs)
        with pytest.raises(NotFinite, match=r"\(weights\): result at timestep 0\.5"):
            Flux1Calls(client, loan).predict(inputs.noise, 0.5, inputs.prompt)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_mid_collective(rank, client, long_job, wait_until, processes):
    ranks = [worker.pid for worker in client.status().workers]
    job, _events = long_job()
    os.kill(ranks[rank], signal.SIGKILL)
    with pytest.raises(WorkersLost):
        job.result()
    wait_until(lambda: not any(processes.is_running(pid) for pid in ranks), "the old group to be gone")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_hangs_nccl_until_the_deadline(rank, client, long_job, wait_until, processes):
    ranks = [worker.pid for worker in client.status().workers]
    job, _events = long_job()
    os.kill(ranks[rank], signal.SIGSTOP)
    with pytest.raises(WorkersLost, match="no report"):
        job.result()
    wait_until(lambda: not any(processes.is_running(pid) for pid in ranks), "the old group to be gone")


def test_cancel_is_agreed_by_both_ranks(client, long_job):
    ranks = [worker.pid for worker in client.status().workers]
    job, _events = long_job()
    job.cancel()
    with pytest.raises(Cancelled):
        job.result()
    assert [worker.pid for worker in client.status().workers] == ranks


def test_an_exporter_that_dies_under_a_job(client, exporter, long_job, wait_until):
    """Its handle is closed by the first rank, its copy freed by the second; nobody is rebuilt."""
    ranks = [worker.pid for worker in client.status().workers]
    child, component_id = exporter()
    job, _events = long_job(client, component_id)
    child.kill()
    child.wait()
    with pytest.raises(LeaseLost, match="is gone"):
        job.result()
    wait_until(lambda: len(client.status().components) == 1, "the loan of the dead process to end")
    assert [worker.pid for worker in client.status().workers] == ranks


def test_memory_of_a_gpu_without_a_worker(start_daemon, state, make_arena):
    """One worker, on the first GPU: what lies on the second one is refused by name, and the worker serves on."""
    single = start_daemon(1, "cuda")
    single.wait_ready()
    foreign, own = make_arena(state, "cuda:1"), make_arena(state)
    with single.connect() as client:
        with pytest.raises(ForeignGpu, match="GPU-"):
            client.lend(foreign.tensors)
        foreign.close()
        with client.lend(own.tensors) as loan:
            assert loan.copied.total == 0
    own.close()
    single.stop()


def test_memory_of_the_other_ranks_gpu(client, loan, state, make_inputs, run, make_arena):
    """Lent from the second GPU: the second rank maps it, and the first one gets the copy."""
    inputs = make_inputs(seed=6)
    expected = run(client, loan, inputs)
    arena = make_arena(state, "cuda:1")
    with client.lend(arena.tensors) as other:
        assert other.copied.total == other.copied.peer == arena.size_bytes
        assert torch.equal(run(client, other, inputs), expected)
    arena.close()


def test_adopted_copies_are_the_ranks_own(client, make_inputs, run, make_arena):
    arena = make_arena(checkpoints.flux1_state_dict(2, dtype=torch.bfloat16, **LARGE))
    inputs = make_inputs()
    loan = client.lend(arena.tensors)
    expected = run(client, loan, inputs)
    copied = loan.adopt()
    assert copied.device_to_device == copied.total == loan.lent_bytes  # the second rank had its copy already
    arena.close()  # nobody maps it any more
    assert torch.equal(run(client, loan.component_id, inputs), expected)
    client.revoke(loan)


def test_fifty_loans_leave_nothing_on_either_gpu(client, make_inputs, run, make_arena):
    """Each cycle exports, opens and closes a handle of its own; the driver's memory for them must come back."""
    state = checkpoints.flux1_state_dict(1, dtype=torch.bfloat16, heads=4, double_blocks=1, single_blocks=1)
    ranks = [worker.pid for worker in client.status().workers]
    inputs = make_inputs()

    def cycle() -> torch.Tensor:
        arena = make_arena(state)
        with client.lend(arena.tensors) as loan:
            latents = run(client, loan, inputs, steps=1)
        arena.close()
        return latents

    expected = [cycle() for _ in range(5)][-1]
    free, fds = free_on_all(), [len(os.listdir(f"/proc/{pid}/fd")) for pid in ranks]
    for _ in range(50):
        assert torch.equal(cycle(), expected)
    assert is_back(free, 8)
    for pid, then in zip(ranks, fds, strict=True):
        assert len(os.listdir(f"/proc/{pid}/fd")) <= then + 2
    assert [worker.pid for worker in client.status().workers] == ranks


def test_a_killed_daemons_memory_comes_back(start_daemon, arena, long_job, wait_until, processes):
    before = free_on_all()
    other = start_daemon(2, "cuda")
    other.wait_ready()
    with other.connect() as client:
        loan = client.lend(arena.tensors)
        ranks = [worker.pid for worker in client.status().workers]
        job, _events = long_job(client, loan)
        other.process.kill()
        with pytest.raises(DaemonUnreachable):
            job.result()
    wait_until(lambda: not any(processes.is_running(pid) for pid in ranks), "the workers to go with the daemon")
    wait_until(lambda: is_back(before, 64), f"their memory to come back: {before} was free")
