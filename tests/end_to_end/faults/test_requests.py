"""Requests that no worker can serve: a typed error that names the cause, and the next job has the right bits."""

from __future__ import annotations

import os

import pytest
import torch

from xditd.client import (
    BadCheckpoint,
    BadRequest,
    Cancelled,
    LeaseLost,
    UnknownComponent,
    UnknownFamily,
    UnsupportedDtype,
)
from xditd.client.demo import checkpoints


@pytest.mark.parametrize("keep_bytes", [0, 7, 100, 3000, -1])
def test_truncated_file(keep_bytes, client, files, tmp_path, good_job):
    whole = files.transformer.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:keep_bytes])
    with pytest.raises(BadCheckpoint, match=r"cut\.safetensors"):
        client.lend(path)
    good_job()


def test_malformed_header(client, tmp_path, good_job):
    path = tmp_path / "bad.safetensors"
    path.write_bytes((12).to_bytes(8, "little") + b"not json at.")
    with pytest.raises(BadCheckpoint, match=r"bad\.safetensors.*JSON"):
        client.lend(path)
    good_job()


def test_missing_extra_and_misshapen_tensors_are_all_named(client, good_job):
    state = checkpoints.flux1_state_dict(1)
    del state["double_blocks.0.img_attn.qkv.weight"], state["img_in.bias"]
    state["surplus.weight"] = torch.zeros(3)
    state["final_layer.linear.bias"] = torch.zeros(65)
    with pytest.raises(BadCheckpoint) as caught:
        client.lend(state)
    for name in ("double_blocks.0.img_attn.qkv.weight", "img_in.bias", "surplus.weight", "final_layer.linear.bias"):
        assert name in str(caught.value)
    good_job()


def test_unknown_family(client, good_job):
    with pytest.raises(UnknownFamily):
        client.lend({"blocks.0.weight": torch.zeros(4, 4)}, kind="transformer")
    good_job()


def test_unsupported_dtype(client, good_job):
    state = checkpoints.flux1_state_dict(1)
    name = "single_blocks.0.linear1.weight"
    state[name] = state[name].to(torch.int8)
    with pytest.raises(UnsupportedDtype, match=name):
        client.lend(state)
    good_job()


def test_wrong_kind(client, files, good_job):
    with pytest.raises(BadRequest, match="vae"):
        client.lend(files.transformer, kind="vae")
    good_job()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"height": 120}, "120"),
        ({"height": 0}, "0"),
        ({"width": 10**6}, "1000000"),
        ({"steps": 0}, "0"),
        ({"steps": 10**9}, "1000000000"),
        ({"sigmas": [0.5, 0.9]}, "sigma"),
        ({"guidance_scale": float("nan")}, "guidance"),
    ],
)
def test_values_that_no_job_can_use(change, named, client, transformer, make_inputs, good_job):
    inputs = make_inputs()
    values = {"height": 128, "width": 128, "steps": 2, "seed": 1, **change}
    with pytest.raises(BadRequest, match=named):
        client.generate(transformer, inputs.conditioning, **values).result()
    good_job()


@pytest.mark.parametrize("where", ["prompt_embeds", "pooled_prompt_embeds", "noise"])
def test_nan_in_inputs_is_named(where, client, transformer, make_inputs, run, good_job):
    inputs = make_inputs()
    getattr(inputs, where).view(-1)[3] = float("nan")
    with pytest.raises(BadRequest, match=where):
        run(client, transformer, inputs)
    good_job()


def test_embeddings_of_another_width(client, transformer, make_inputs, run, good_job):
    inputs = make_inputs()
    inputs.prompt_embeds = inputs.prompt_embeds[..., :100]
    with pytest.raises(BadRequest, match="4096"):
        run(client, transformer, inputs)
    good_job()


def test_a_returned_loan_is_refused(client, files, make_inputs, run, good_job):
    loan = client.lend(files.tuned)
    component_id = loan.component_id
    loan.return_()
    with pytest.raises((LeaseLost, UnknownComponent)):
        run(client, loan, make_inputs())
    with pytest.raises(UnknownComponent, match=component_id):
        run(client, component_id, make_inputs())
    good_job()


def test_cancel_in_mid_job(client, transformer, make_inputs, good_job):
    inputs = make_inputs()
    job = client.generate(transformer, inputs.conditioning, height=128, width=128, steps=500, seed=1)
    last = 0
    for event in job:
        last = event.step
        if event.step == 3:
            job.cancel()
            break
    with pytest.raises(Cancelled):
        job.result()
    assert last == 3
    good_job()


def test_a_lease_that_ends_under_a_job(client, files, make_inputs, good_job):
    loan = client.lend(files.tuned)
    inputs = make_inputs()
    job = client.generate(loan, inputs.conditioning, height=128, width=128, steps=500, seed=1)
    events = iter(job)  # kept: dropping an iterator cancels its job
    next(events)
    loan.return_()
    with pytest.raises(LeaseLost):
        job.result()
    good_job()


def test_a_block_that_a_failed_job_used_is_unmapped_by_idle_workers(
    daemon, client, files, make_inputs, processes, wait_until
):
    """The client cannot know whether anybody still writes to it, so it lets go of it; workers must not keep it."""
    loan = client.lend(files.tuned)
    inputs = make_inputs(tokens=512)  # more than fits into the block that the tests before have used
    ranks = [worker.pid for worker in client.status().workers]
    before = [processes.memfds(pid) for pid in ranks]
    job = client.generate(loan, inputs.conditioning, height=128, width=128, steps=500, seed=1)
    events = iter(job)
    next(events)
    assert all(processes.memfds(pid) - mapped for pid, mapped in zip(ranks, before, strict=True))
    loan.return_()
    with pytest.raises(LeaseLost):
        job.result()
    wait_until(lambda: [processes.memfds(pid) for pid in ranks] == before, "the block to be unmapped, with no job sent")


@pytest.mark.long
def test_a_hundred_loans_leave_nothing_behind(client, files, good_job):
    status = client.status()
    ranks = [worker.pid for worker in status.workers]

    def cycle() -> None:
        with client.lend(files.tuned):
            pass

    for _ in range(10):
        cycle()
    before = [footprint(pid) for pid in [os.getpid(), *ranks]]
    for _ in range(100):
        cycle()
    after = [footprint(pid) for pid in [os.getpid(), *ranks]]
    for (fds, maps, rss), (fds_now, maps_now, rss_now) in zip(before, after, strict=True):
        assert fds_now <= fds + 2
        assert maps_now <= maps + 8
        assert rss_now <= rss + 32 * 2**20
    good_job()


def footprint(pid: int) -> tuple[int, int, int]:
    """Open descriptors, mappings and resident bytes of a process."""
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    with open(f"/proc/{pid}/maps", "rb") as maps:
        mappings = sum(1 for _ in maps)
    with open(f"/proc/{pid}/statm", "rb") as statm:
        return fds, mappings, int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
