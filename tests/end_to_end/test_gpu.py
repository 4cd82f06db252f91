"""The main path on a GPU: device memory is shared, not copied, and comes back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from running_daemon import until

from xditd.client import ForeignGpu, LeaseLost, NotFinite, OutOfMemory, WorkersLost
from xditd.client.arenas import Arena
from xditd.client.demo import checkpoints
from xditd.client.demo.flux1_calls import Flux1Calls

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.fixture(scope="module")
def daemon(start_daemon):
    """One worker on the first GPU."""
    started = start_daemon(1, "cuda")
    started.wait_ready()
    yield started
    started.stop()


@pytest.fixture
def state():
    return checkpoints.flux1_state_dict(1, dtype=torch.bfloat16)


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def test_an_arena_is_the_workers_memory(client, state, make_inputs, run, relative_error):
    arena = Arena.copy_of(state, "cuda")
    inputs = make_inputs()
    with client.lend(arena.tensors) as loan:
        assert [tier.value for tier in loan.tiers] == ["cuda_ipc"]
        assert loan.copied.total == 0
        before = run(client, loan, inputs)
        assert torch.equal(before, run(client, loan, inputs))
        arena.tensors["img_in.weight"].zero_()
        torch.cuda.synchronize()
        assert relative_error(run(client, loan, inputs), before) > 0.01
    arena.close()


def test_torchs_own_memory_is_lent_as_it_is(client, state, make_inputs, run):
    arena = Arena.copy_of(state, "cuda")
    native = {name: tensor.cuda() for name, tensor in state.items()}
    inputs = make_inputs()
    with client.lend(native) as loan, client.lend(arena.tensors) as other:
        assert loan.copied.total == 0
        assert torch.equal(run(client, loan, inputs), run(client, other, inputs))
    arena.close()


def test_an_announced_model_is_warmed_up_and_the_first_job_checks_the_clients_weights(
    start_daemon, state, make_inputs, run
):
    """All GPUs take part: the warm-up exchanges tokens as a job does."""
    started = start_daemon(min(2, torch.cuda.device_count()), "cuda")
    arena = Arena.copy_of(state, "cuda")
    try:
        started.wait_ready()
        with started.connect() as client:
            client.prepare({name: torch.empty_like(each, device="meta") for name, each in state.items()})
            until(lambda: "model warmed up family=flux1" in started.log_text() or None, "a warm-up", started.log)
            assert client.status().fused_checks == ()
            free = free_bytes()
            with client.lend(arena.tensors) as loan:
                first = run(client, loan, make_inputs())
                assert torch.equal(run(client, loan, make_inputs()), first)
            assert free - free_bytes() < 512 * MIB  # what jobs keep
            checks = client.status().fused_checks
            assert [each.is_used for each in checks] == [True]
    finally:
        started.stop()
        arena.close()


def test_no_second_copy_on_the_lending_gpu(client, make_inputs, run):
    config = {"heads": 16, "double_blocks": 4, "single_blocks": 4}
    arena = Arena.copy_of(checkpoints.flux1_state_dict(1, dtype=torch.bfloat16, **config), "cuda")
    assert arena.size_bytes > 1000 * MIB
    with client.lend(arena.tensors) as loan:
        run(client, loan, make_inputs())  # kernels and workspaces are loaded now
    free = free_bytes()
    with client.lend(arena.tensors) as loan:
        assert free - free_bytes() < 64 * MIB
        run(client, loan, make_inputs())
        assert free - free_bytes() < 64 * MIB
    arena.close()


def test_host_tensors_and_files_are_uploaded_once(client, state, files, make_inputs, run):
    arena = Arena.copy_of({name: tensor.float() for name, tensor in state.items()}, "cuda")
    inputs = make_inputs()
    with client.lend(arena.tensors) as by_handle, client.lend(files.transformer) as by_file:
        assert by_file.copied.host_to_device == by_file.lent_bytes
        assert by_handle.copied.total == 0
        assert torch.equal(run(client, by_file, inputs), run(client, by_file, inputs))


def test_a_file_that_is_overwritten_with_its_old_mtime_after_it_was_lent(client, files, tmp_path, make_inputs, run):
    """Jobs use the copy on the GPU; the same path again is another loan, of the other bytes."""
    path = shutil.copyfile(files.transformer, tmp_path / "copy.safetensors")
    inputs = make_inputs()
    with client.lend(path) as loan, client.lend(files.tuned) as tuned:
        before, expected = run(client, loan, inputs), run(client, tuned, inputs)
        old = path.stat()
        with path.open("r+b") as file:
            file.write(files.tuned.read_bytes())
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
        assert path.stat().st_size == old.st_size
        assert torch.equal(run(client, loan, inputs), before)
        with client.lend(path) as again:
            assert not again.is_reused
            assert torch.equal(run(client, again, inputs), expected)


def test_a_weight_that_is_not_finite_is_named(client, state, make_inputs, run):
    arena = Arena.copy_of(state, "cuda")
    bias = arena.tensors["img_in.bias"]
    inputs = make_inputs()
    with client.lend(arena.tensors, label="weights") as loan:
        before, kept = run(client, loan, inputs), bias[5].item()
        bias[5] = torch.nan
        torch.cuda.synchronize()
        with pytest.raises(NotFinite, match=r"\(weights\): latents after step 1 of 4"):
            run(client, loan, inputs)
        with pytest.raises(NotFinite, match=r"\(weights\): result at timestep 0\.5"):
            Flux1Calls(client, loan).predict(inputs.noise, 0.5, inputs.prompt)
        bias[5] = kept
        torch.cuda.synchronize()
        assert torch.equal(run(client, loan, inputs), before)
    arena.close()


def test_float32_norms_beside_bfloat16_weights_are_kept(client, state, make_inputs, run, relative_error):
    """Queries' norms one part in 1,000 larger: in bfloat16 that would be lost."""
    inputs = make_inputs()
    mixed = {name: tensor.float() if "_norm." in name else tensor for name, tensor in state.items()}
    larger = {name: tensor * 1.001 if name.endswith("query_norm.scale") else tensor for name, tensor in mixed.items()}
    assert {tensor.dtype for tensor in mixed.values()} == {torch.bfloat16, torch.float32}
    arenas = [Arena.copy_of(each, "cuda") for each in (state, mixed, larger)]
    with client.lend(arenas[0].tensors) as plain, client.lend(arenas[1].tensors) as loan:
        result = run(client, loan, inputs)
        assert torch.equal(result, run(client, loan, inputs))
        assert relative_error(result, run(client, plain, inputs)) < 3e-2
        with client.lend(arenas[2].tensors) as other:
            assert not torch.equal(result, run(client, other, inputs))
    for arena in arenas:
        arena.close()


def test_float32_norms_of_a_bfloat16_vae_are_kept(client, relative_error):
    state = checkpoints.flux_vae_state_dict(3, dtype=torch.bfloat16)
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in state.items()}
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    arenas = [Arena.copy_of(each, "cuda") for each in (state, mixed)]
    with client.lend(arenas[0].tensors) as plain, client.lend(arenas[1].tensors) as loan:
        image = client.decode(loan, latents)
        assert torch.equal(image, client.decode(loan, latents))
        assert relative_error(image, client.decode(plain, latents)) < 3e-2
    for arena in arenas:
        arena.close()


def test_memory_comes_back_from_a_killed_client(daemon, wait_until):
    free = free_bytes()
    script = textwrap.dedent("""
        import sys, torch
        from xditd.client import Client
        from xditd.client.arenas import Arena
        from xditd.client.demo import checkpoints
        shape = {"heads": 16, "double_blocks": 4, "single_blocks": 4}
        arena = Arena.copy_of(checkpoints.flux1_state_dict(1, dtype=torch.bfloat16, **shape), "cuda")
        client = Client(sys.argv[1])
        loan = client.lend(arena.tensors)
        print("lent", flush=True)
        sys.stdin.read()
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(daemon.runtime_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "lent\n"
    assert free - free_bytes() > 1000 * MIB
    child.kill()
    child.wait()
    wait_until(lambda: free - free_bytes() < 64 * MIB or None, "the memory of a killed client to come back")


def test_adopted_arena_is_the_workers_own(client, make_inputs, run):
    config = {"heads": 16, "double_blocks": 4, "single_blocks": 4}
    arena = Arena.copy_of(checkpoints.flux1_state_dict(1, dtype=torch.bfloat16, **config), "cuda")
    inputs = make_inputs()
    loan = client.lend(arena.tensors)
    expected = run(client, loan, inputs)
    copied = loan.adopt()
    assert copied.device_to_device == copied.total == loan.lent_bytes
    for tensor in arena.tensors.values():
        tensor.zero_()
    torch.cuda.synchronize()
    arena.close()  # nobody maps it any more
    assert torch.equal(run(client, loan.component_id, inputs), expected)
    free = free_bytes()
    client.revoke(loan)
    assert free_bytes() - free > 1000 * MIB
    assert [worker.loaded for worker in client.status().workers] == [0]


def test_a_job_without_room_is_refused_and_the_next_one_served(client, state, make_inputs, run):
    arena = Arena.copy_of(state, "cuda")
    inputs = make_inputs()
    with client.lend(arena.tensors) as loan:
        expected = run(client, loan, inputs)
        hog = torch.empty(free_bytes() - 200 * MIB, dtype=torch.uint8, device="cuda")
        large = make_inputs(tokens=512, pixels=8192)  # 262,144 image tokens: a single activation takes 128 MiB
        with pytest.raises(OutOfMemory):
            run(client, loan, large, steps=1)
        del hog
        torch.cuda.empty_cache()
        assert torch.equal(run(client, loan, inputs), expected)
    arena.close()


def test_a_killed_workers_memory_comes_back_and_its_loan_is_mapped_again(
    client, make_inputs, run, wait_until, processes
):
    config = {"heads": 16, "double_blocks": 4, "single_blocks": 4}
    arena = Arena.copy_of(checkpoints.flux1_state_dict(1, dtype=torch.bfloat16, **config), "cuda")
    inputs = make_inputs()
    with client.lend(arena.tensors) as loan:
        expected = run(client, loan, inputs)
        free = free_bytes()
        (worker,) = client.status().workers
        job = client.generate(loan, inputs.conditioning, height=512, width=512, steps=1000, seed=1)
        events = iter(job)  # kept: dropping an iterator cancels its job
        next(events)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkersLost):
            job.result()
        wait_until(lambda: not processes.is_running(worker.pid), "the old worker to be gone")
        assert torch.equal(run(client, loan, inputs), expected)  # waits for the new one
        assert free - free_bytes() < 256 * MIB  # kernels and workspaces, and no second gigabyte of weights
    arena.close()


def test_memory_of_another_gpu_is_refused(start_daemon, state, wait_until):
    """Workers on the CPU stand for workers on other GPUs: none of them has this one."""
    elsewhere = start_daemon(1)
    elsewhere.wait_ready()
    arena = Arena.copy_of(state, "cuda")
    with elsewhere.connect() as client, pytest.raises(ForeignGpu, match="GPU-"):
        client.lend(arena.tensors)
    arena.close()
    elsewhere.stop()


def test_fifty_loans_leave_no_handle_open(daemon, client, make_inputs, run):
    """Each cycle exports, opens and closes a handle of its own; the driver's memory for them must come back."""
    config = {"heads": 4, "double_blocks": 1, "single_blocks": 1}
    state = checkpoints.flux1_state_dict(1, dtype=torch.bfloat16, **config)
    (worker,) = client.status().workers
    inputs = make_inputs()

    def cycle() -> torch.Tensor:
        arena = Arena.copy_of(state, "cuda")
        with client.lend(arena.tensors) as loan:
            latents = run(client, loan, inputs, steps=1)
        arena.close()
        return latents

    expected = [cycle() for _ in range(5)][-1]
    free, fds = free_bytes(), len(os.listdir(f"/proc/{worker.pid}/fd"))
    for _ in range(50):
        assert torch.equal(cycle(), expected)
    assert free - free_bytes() < 8 * MIB
    assert len(os.listdir(f"/proc/{worker.pid}/fd")) <= fds + 2
    assert [after.pid for after in client.status().workers] == [worker.pid]


def test_a_dead_exporters_component_is_gone(daemon, client, state, make_inputs, run, wait_until):
    """Its handle is closed by the workers, and a job that names it is refused; others' memory is untouched."""
    script = textwrap.dedent("""
        import sys, torch
        from xditd.client import Client
        from xditd.client.arenas import Arena
        from xditd.client.demo import checkpoints
        arena = Arena.copy_of(checkpoints.flux1_state_dict(2, dtype=torch.bfloat16), "cuda")
        client = Client(sys.argv[1])
        print(client.lend(arena.tensors).component_id, flush=True)
        sys.stdin.read()
    """)
    arena = Arena.copy_of(state, "cuda")
    inputs = make_inputs()
    with client.lend(arena.tensors) as loan:
        expected = run(client, loan, inputs)
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(daemon.runtime_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        component_id = child.stdout.readline().strip()
        run(client, component_id, inputs)
        child.kill()
        child.wait()
        wait_until(lambda: len(client.status().components) == 1, "the loan of the dead process to end")
        with pytest.raises(LeaseLost, match="is gone"):
            run(client, component_id, inputs)
        assert torch.equal(run(client, loan, inputs), expected)
    arena.close()
