"""Bad values are refused before anything is sent, by name, value and remedy."""

import pytest

torch = pytest.importorskip("torch")

from xditd.client import job_inputs  # noqa: E402
from xditd.ipc.errors import BadRequest  # noqa: E402

EMBEDS, POOLED = torch.zeros(1, 8, 32), torch.zeros(1, 16)


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (lambda: job_inputs.check_steps(0), r"steps: 0 is not a whole number from 1 to 1000"),
        (lambda: job_inputs.check_steps(10**9), r"steps: 1000000000 is not"),
        (lambda: job_inputs.check_steps(2.5), r"steps: 2\.5 is not"),
        (lambda: job_inputs.check_steps(True), r"steps: True is not"),
        (lambda: job_inputs.check_size(100, 64), r"height: 100 is not a multiple of 16 pixels; 96 is near"),
        (lambda: job_inputs.check_size(64, 0), r"width: 0 is not a whole number"),
        (lambda: job_inputs.check_size(64, 10**6), r"width: 1000000 is not a whole number from 16 to 8192"),
        (lambda: job_inputs.check_guidance("guidance_scale", float("nan")), r"guidance_scale: nan is not a number"),
        (lambda: job_inputs.check_guidance("guidance_scale", -1), r"guidance_scale: -1 is not"),
        (lambda: job_inputs.check_step_cache(1.5), r"step_cache: 1.5 is not a number from 0"),
        (lambda: job_inputs.check_step_cache(float("nan")), r"step_cache: nan is not a number from 0"),
        (lambda: job_inputs.check_sigmas([1.0, 0.5], 3), r"sigmas: 2 values for 3 steps"),
        (lambda: job_inputs.check_sigmas([1.0, 0.5, 0.0], 2), r"leave the final 0 out"),
        (lambda: job_inputs.check_sigmas([0.5, 1.0], 2), r"sigmas\[1\]: 1\.0 does not descend from 0\.5"),
        (lambda: job_inputs.check_sigmas([1.5, 1.0], 2), r"sigmas\[0\]: 1\.5 is not in \(0, 1\]"),
        (lambda: job_inputs.check_sigmas([1.0, float("nan")], 2), r"sigmas\[1\]: nan is not finite"),
        (lambda: job_inputs.check_sigmas(["a"], 1), r"sigmas: a flat sequence of numbers is needed"),
        (lambda: job_inputs.check_sigmas(torch.ones(1, 1), 1), r"sigmas: a flat sequence of numbers"),
        (lambda: job_inputs.check_timestep(500.0, 1), r"timestep: 500\.0 is not in \[0, 1\]; give sigmas"),
        (lambda: job_inputs.check_timestep([0.5, 0.5], 3), r"timestep: 2 values for a batch of 3"),
        (lambda: job_inputs.check_foreseen([1.0, 500.0]), r"sigmas\[1\]: 500\.0 is not in \[0, 1\]"),
        (lambda: job_inputs.check_foreseen([0.5] * 10_001), r"sigmas: 10001 values, at most \d+ can be foreseen"),
        (lambda: job_inputs.check_embeds(EMBEDS[0], POOLED), r"prompt_embeds: shape \(8, 32\) instead of \(batch"),
        (lambda: job_inputs.check_embeds(EMBEDS, torch.zeros(2, 16)), r"batch 2, but prompt_embeds has batch 1"),
        (lambda: job_inputs.check_embeds(EMBEDS[:, :0], POOLED), r"every side at least 1"),
        (lambda: job_inputs.check_embeds(EMBEDS.int(), POOLED), r"dtype int32 cannot be used; convert it to one of"),
        (lambda: job_inputs.check_embeds("prompt", POOLED), r"prompt_embeds: a torch tensor .* not str"),
        (lambda: job_inputs.check_noise(torch.zeros(1, 16, 8, 8), 1, 64, 128), r"instead of \(1, 16, 8, 16\)"),
        (lambda: job_inputs.check_noise(torch.zeros(1, 64, 16), 1, 64, 64), r"noise: shape \(1, 64, 16\)"),
        (lambda: job_inputs.check_latents("latents", torch.zeros(1, 4, 8, 8)), r"4 channels instead of 16"),
        (
            lambda: job_inputs.check_latents("latents", torch.zeros(1, 16, 2, 1026)),
            r"latents: latent width 1026 stands for 8208 pixels, at most 8192",
        ),
        (lambda: job_inputs.check_variant("bfloat16"), r"variant: 'bfloat16' is not one of 'class', 'float32_time'"),
        (lambda: job_inputs.check_variant(None), r"variant: None is not one of"),
        (lambda: job_inputs.check_even_latents("latents", torch.zeros(1, 16, 7, 8)), r"latent height 7 is odd"),
        (lambda: job_inputs.check_image(torch.zeros(1, 3, 60, 64)), r"image: height 60 is not a multiple of 8"),
        (lambda: job_inputs.check_image(torch.zeros(1, 4, 64, 64)), r"4 channels instead of 3"),
    ],
)
def test_refuses(check, says):
    with pytest.raises(BadRequest, match=says):
        check()


def test_accepts_what_jobs_can_use():
    assert job_inputs.check_embeds(EMBEDS, POOLED) == 1
    job_inputs.check_size(112, 8_192)
    job_inputs.check_steps(1_000)
    job_inputs.check_latents("latents", torch.zeros(1, 16, 2, 1024))
    assert job_inputs.check_variant("float32_time") == "float32_time"
    assert job_inputs.check_sigmas(torch.tensor([1.0, 0.5]), 2) == (1.0, 0.5)
    assert job_inputs.check_timestep(torch.tensor(0.25), 2) == (0.25, 0.25)
    assert job_inputs.check_timestep(1, 1) == (1.0,)
    assert job_inputs.check_foreseen(None) == ()
    assert job_inputs.check_foreseen(torch.tensor([0.25, 1.0, 0.0])) == (0.25, 1.0, 0.0)
    job_inputs.check_noise(torch.zeros(1, 16, 14, 14), 1, 112, 112)
    job_inputs.check_image(torch.zeros(1, 3, 72, 64))
