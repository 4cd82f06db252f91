"""Bad values are refused before anything is sent, by name, value and remedy."""

import pytest

torch = pytest.importorskip("torch")

import sample_facts  # noqa: E402

from xditd.client.jobs import checks  # noqa: E402
from xditd.ipc.errors import BadRequest  # noqa: E402

EMBEDS, POOLED = torch.zeros(1, 5, 8), torch.zeros(1, 4)
FACTS, LISTS = sample_facts.TRANSFORMER.transformer, sample_facts.LISTS.transformer
LATENTS, VAE = FACTS.latents, sample_facts.VAE.vae


def given(embeds=EMBEDS, pooled=POOLED, **more):
    """Check conditioning as FLUX.1 takes it."""
    return checks.check_conditioning(
        {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, **more}, FACTS.conditioning
    )


def lists(texts, **more):
    """Check conditioning as Z-Image takes it."""
    return checks.check_conditioning({"prompt_embeds": texts, **more}, LISTS.conditioning)


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (lambda: checks.check_steps(0), r"steps: 0 is not a whole number from 1 to 1000"),
        (lambda: checks.check_steps(10**9), r"steps: 1000000000 is not"),
        (lambda: checks.check_steps(2.5), r"steps: 2\.5 is not"),
        (lambda: checks.check_steps(True), r"steps: True is not"),
        (lambda: checks.check_size(100, 64, LATENTS), r"height: 100 is not a multiple of 16 pixels; 96 is near"),
        (lambda: checks.check_size(64, 0, LATENTS), r"width: 0 is not a whole number"),
        (lambda: checks.check_size(64, 10**6, LATENTS), r"width: 1000000 is not a whole number from 16 to 8192"),
        (lambda: checks.check_guidance("guidance_scale", float("nan")), r"guidance_scale: nan is not a number"),
        (lambda: checks.check_guidance("guidance_scale", -1), r"guidance_scale: -1 is not"),
        (lambda: checks.check_step_cache(1.5, FACTS), r"step_cache: 1.5 is not a number from 0"),
        (lambda: checks.check_step_cache(float("nan"), FACTS), r"step_cache: nan is not a number from 0"),
        (lambda: checks.check_sigmas([1.0, 0.5], 3), r"sigmas: 2 values for 3 steps"),
        (lambda: checks.check_sigmas([1.0, 0.5, 0.0], 2), r"leave the final 0 out"),
        (lambda: checks.check_sigmas([0.5, 1.0], 2), r"sigmas\[1\]: 1\.0 does not descend from 0\.5"),
        (lambda: checks.check_sigmas([1.5, 1.0], 2), r"sigmas\[0\]: 1\.5 is not in \(0, 1\]"),
        (lambda: checks.check_sigmas([1.0, float("nan")], 2), r"sigmas\[1\]: nan is not finite"),
        (lambda: checks.check_sigmas(["a"], 1), r"sigmas: a flat sequence of numbers is needed"),
        (lambda: checks.check_sigmas(torch.ones(1, 1), 1), r"sigmas: a flat sequence of numbers"),
        (lambda: checks.check_foreseen({"t": [0.5] * 10_001}), r"foreseen\.t: 10001 values, at most \d+ can be"),
        (lambda: checks.check_foreseen({"t": ["a"]}), r"foreseen\.t: a flat sequence of numbers is needed"),
        (lambda: given(EMBEDS[0]), r"prompt_embeds: shape \(5, 8\) instead of \(batch, tokens, 8\)"),
        (lambda: given(EMBEDS[..., :4]), r"prompt_embeds: shape \(1, 5, 4\) instead of \(batch, tokens, 8\)"),
        (lambda: given(pooled=torch.zeros(2, 4)), r"batch 2, but prompt_embeds has batch 1; give one row for each"),
        (lambda: given(EMBEDS[:, :0]), r"every side at least 1"),
        (lambda: given(EMBEDS.int()), r"dtype int32 cannot be used; convert it to one of"),
        (lambda: given("prompt"), r"prompt_embeds: a torch tensor .* not str"),
        (lambda: given(EMBEDS.repeat(65, 1, 1), POOLED.repeat(65, 1)), r"prompt_embeds: batch 65, at most 64; split"),
        (lambda: given(pooled=None), r"conditioning: lacks pooled_prompt_embeds; this transformer takes prompt_embeds"),
        (lambda: given(clip=EMBEDS), r"conditioning: clip is not known here; this transformer takes prompt_embeds"),
        (lambda: checks.check_conditioning(EMBEDS, FACTS.conditioning), r"a dict by name is needed, not Tensor"),
        (lambda: lists(EMBEDS), r"prompt_embeds: a list of tensors \(tokens, 8\) is needed, one for each image"),
        (lambda: lists([]), r"prompt_embeds: a list of tensors \(tokens, 8\) is needed"),
        (lambda: lists([EMBEDS[0], EMBEDS]), r"prompt_embeds\[1\]: shape \(1, 5, 8\) instead of \(tokens, 8\)"),
        (lambda: lists([EMBEDS[0]] * 2, negative_prompt_embeds=[EMBEDS[0]]), r"batch 1, but prompt_embeds has batch 2"),
        (lambda: checks.check_options({"cfg": 1}, FACTS), r"options: cfg=1 is not known; give one of shift$"),
        (
            lambda: checks.check_options({"shfit": 3.0}, FACTS),
            r"options: shfit=3\.0 is not known.*did you mean shift\?",
        ),
        (lambda: checks.check_options({"cfg": 1}, LISTS), r"options: cfg=1 is not known; this transformer has none"),
        (lambda: checks.check_options({"shift": "a"}, FACTS), r"options: shift='a' is not a finite number"),
        (
            lambda: checks.check_step_cache(0.1, LISTS),
            r"step_cache: 0\.1 is given, but this transformer has no step cache",
        ),
        (lambda: checks.check_noise(torch.zeros(1, 16, 8, 8), 1, 64, 128, LATENTS), r"instead of \(1, 16, 8, 16\)"),
        (lambda: checks.check_noise(torch.zeros(1, 64, 16), 1, 64, 64, LATENTS), r"noise: shape \(1, 64, 16\)"),
        (lambda: checks.check_latents("latents", torch.zeros(1, 4, 8, 8), LATENTS), r"4 channels instead of 16"),
        (
            lambda: checks.check_latents("latents", torch.zeros(1, 16, 2, 1026), LATENTS),
            r"latents: latent width 1026 stands for 8208 pixels, at most 8192",
        ),
        (lambda: checks.check_variant("bfloat16", FACTS), r"variant: 'bfloat16' is not one of 'class', 'float32_time'"),
        (lambda: checks.check_variant(None, FACTS), r"variant: None is not one of"),
        (lambda: checks.check_image(torch.zeros(1, 3, 60, 64), VAE), r"image: height 60 is not a multiple of 8"),
        (lambda: checks.check_image(torch.zeros(1, 4, 64, 64), VAE), r"4 channels instead of 3"),
    ],
)
def test_bad_values_are_refused(check, says):
    with pytest.raises(BadRequest, match=says):
        check()


def test_good_values_are_accepted():
    assert given() == 1
    assert lists([EMBEDS[0], EMBEDS[0, :2]]) == 2
    assert lists([EMBEDS[0]], negative_prompt_embeds=[EMBEDS[0, :1]]) == 1
    checks.check_size(112, 8_192, LATENTS)
    checks.check_steps(1_000)
    checks.check_latents("latents", torch.zeros(1, 16, 2, 1024), LATENTS)
    assert checks.check_variant("float32_time", FACTS) == "float32_time"
    assert checks.check_options({"shift": 3}, FACTS) == {"shift": 3}
    assert checks.check_options(None, LISTS) == {}
    assert checks.check_step_cache(0, LISTS) == 0.0
    assert checks.check_sigmas(torch.tensor([1.0, 0.5]), 2) == (1.0, 0.5)
    assert checks.check_foreseen(None) == {}
    assert checks.check_foreseen({"t": torch.tensor([0.25, 1.0, 0.0])}) == {"t": (0.25, 1.0, 0.0)}
    checks.check_noise(torch.zeros(1, 16, 14, 14), 1, 112, 112, LATENTS)
    checks.check_image(torch.zeros(1, 3, 72, 64), VAE)
