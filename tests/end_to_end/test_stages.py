"""A daemon whose workers are stages: generations are right, single steps are refused, faults end as elsewhere."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from xditd.client import Cancelled, Unsupported, WorkersLost

pytestmark = [pytest.mark.long, pytest.mark.slow]

STEPS = 4
FLAGS = ("--layout", "pipefusion=2", "--pipefusion-warm-up-steps", "3", "--pipefusion-patches", "4")


@pytest.fixture(scope="module")
def stages(start_daemon):
    started = start_daemon(2, flags=FLAGS)
    started.wait_ready()
    yield started
    started.stop()


@pytest.fixture
def client(stages):
    with stages.connect() as connected:
        yield connected


def test_steps_that_warm_up_are_exact_and_later_ones_repeat(
    client, transformer, make_inputs, run, diffusers_run, relative_error
):
    status = client.status()
    assert status.parallel["pipefusion"] == 2
    inputs = make_inputs(15, 112)
    assert relative_error(run(client, transformer, inputs, steps=3), diffusers_run(inputs, steps=3)) <= 1e-6
    first = run(client, transformer, inputs, steps=STEPS)
    assert 0.0 < relative_error(first, diffusers_run(inputs, steps=STEPS)) < 0.15
    assert torch.equal(first, run(client, transformer, inputs, steps=STEPS))


def test_an_image_with_previews_comes_from_the_first_stage(client, transformer, vae, make_inputs):
    inputs = make_inputs()
    given = {"vae": vae, "noise": inputs.noise, "height": 128, "width": 128, "steps": STEPS}
    job = client.generate(transformer, inputs.prompt_embeds, inputs.pooled_prompt_embeds, previews=True, **given)
    seen = [(event.step, job.denoised()) for event in job]
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(denoised.abs().max() > 0 for _, denoised in seen)
    plain = client.generate(transformer, inputs.prompt_embeds, inputs.pooled_prompt_embeds, **given).result()
    assert torch.equal(job.result().latents, plain.latents)
    assert torch.equal(job.result().image, plain.image)


def test_single_steps_are_refused_by_name(client, transformer, make_inputs, run):
    inputs = make_inputs()
    with pytest.raises(
        Unsupported, match=r"layout pipefusion=2 runs whole generations, not single steps: use generate"
    ):
        client.denoise(transformer, inputs.noise, 0.7, inputs.prompt_embeds, inputs.pooled_prompt_embeds, 3.5)
    assert run(client, transformer, inputs).isfinite().all()


def long_job(client, transformer, inputs):
    """Start a job of many steps, past its warm-up; the iterator is kept, since dropping it cancels the job."""
    job = client.generate(
        transformer, inputs.prompt_embeds, inputs.pooled_prompt_embeds, height=128, width=128, steps=500, seed=1
    )
    events = iter(job)
    while next(events).step < 5:
        pass
    return job, events


def test_a_cancelled_job_ends_at_its_next_step_and_the_next_one_is_right(client, transformer, make_inputs, run):
    inputs = make_inputs()
    expected = run(client, transformer, inputs)
    job, _events = long_job(client, transformer, inputs)
    job.cancel()
    with pytest.raises(Cancelled):
        job.result()
    assert torch.equal(run(client, transformer, inputs), expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_stage_ends_the_group_and_the_next_job_is_right(rank, client, transformer, make_inputs, run):
    inputs = make_inputs()
    expected = run(client, transformer, inputs)
    before = client.status()
    job, _events = long_job(client, transformer, inputs)
    os.kill(before.workers[rank].pid, signal.SIGKILL)
    with pytest.raises(WorkersLost):
        job.result()
    assert torch.equal(run(client, transformer, inputs), expected)
    assert client.status().counters.group_starts == before.counters.group_starts + 1
