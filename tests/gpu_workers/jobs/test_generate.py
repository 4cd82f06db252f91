"""The one denoising loop, as jobs ask for it: what it reports, what it refuses, and what a client leaves to the family.

FLUX.1 runs in it here; that its bits are those of diffusers is in ``families/flux1/test_recipe.py``.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.ipc import limits
from xditd.ipc.arguments import Kept
from xditd.ipc.errors import BadRequest, Cancelled, NotFinite, UnknownKept, Unsupported
from xditd.ipc.facts import LatentScaling
from xditd.ipc.job_parts import Sampling
from xditd.ipc.requests import Generate

if TYPE_CHECKING:
    from one_rank import OneRank

State = dict[str, torch.Tensor]
NAN = float("nan")


@pytest.fixture
def messages(rank: OneRank) -> ModuleType:
    import flux1_messages

    return flux1_messages


@pytest.fixture(scope="module")
def state() -> State:
    """As few blocks as there can be: what they compute is for other tests."""
    return flux1_state_dict(0, double_blocks=1, single_blocks=1)


@pytest.fixture
def lent(rank: OneRank, state: State) -> OneRank:
    rank.lend("transformer", state)
    return rank


def test_it_gives_what_the_loop_gives(lent: OneRank, messages: ModuleType, direct: ModuleType) -> None:
    room = lent.room()
    job = messages.generate(room, noise=messages.noise())
    lent.run(job)
    model = lent.components.get("transformer", "transformer").match.model
    expected = direct.generate_from(model, messages.conditioning(), messages.noise(), height=64, width=64, steps=2)
    assert torch.equal(room.read(job.out_latents), expected)


def test_a_seed_gives_what_its_noise_gives(lent: OneRank, messages: ModuleType) -> None:
    from xditd.gpu_workers.jobs.generation_inputs import seeded_noise

    found = []
    for given in (
        {"sampling": {"seed": 7}},
        {"noise": seeded_noise(7, (2, 16, 8, 8), torch.float32)},
        {"sampling": {"seed": 8}},
    ):
        room = lent.room()
        job = messages.generate(room, batch=2, **given)
        lent.run(job)
        found.append(room.read(job.out_latents))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_steps_are_told_in_order_and_a_cancelled_job_ends_between_two(lent: OneRank, messages: ModuleType) -> None:
    room = lent.room()
    job = messages.generate(room, noise=messages.noise(), sampling={"steps": 3})
    lent.run(job)
    assert lent.steps == [(1, 3), (2, 3), (3, 3)]
    first = room.read(job.out_latents)
    with pytest.raises(Cancelled, match="cancelled after step 2 of 3"):
        lent.run(job, is_cancelled=lambda: len(lent.steps) == 2)
    assert lent.steps == [(1, 3), (2, 3)]
    lent.run(job)
    assert torch.equal(room.read(job.out_latents), first)


def test_previews_are_there_when_their_step_is_told(lent: OneRank, messages: ModuleType, direct: ModuleType) -> None:
    room = lent.room()
    job = messages.generate(room, noise=messages.noise(), outputs={"out_denoised": (1, 16, 8, 8)})
    shown: list[torch.Tensor] = []
    lent.run(job, on_step=lambda *_: shown.append(room.read(job.out_denoised)))
    expected: list[torch.Tensor] = []
    model = lent.components.get("transformer", "transformer").match.model
    direct.generate_from(
        model,
        messages.conditioning(),
        messages.noise(),
        height=64,
        width=64,
        steps=2,
        on_denoised=expected.append,
    )
    assert len(shown) == 2
    assert all(torch.equal(*pair) for pair in zip(shown, expected, strict=True))
    assert torch.equal(shown[-1], room.read(job.out_latents))  # the last step ends at what it takes for clean
    plain = lent.room()
    without = messages.generate(plain, noise=messages.noise())
    lent.run(without)
    assert torch.equal(plain.read(without.out_latents), room.read(job.out_latents))


@pytest.mark.usefixtures("all_cores")
def test_an_image_is_decoded_from_the_latents_and_cut_off_at_its_range(
    lent: OneRank, messages: ModuleType, direct: ModuleType, demo_vae: State
) -> None:
    # Weights that overshoot, so that there is something to cut off.
    lent.lend("vae", {**demo_vae, "decoder.conv_out.weight": 50 * demo_vae["decoder.conv_out.weight"]})
    room = lent.room()
    both = {"transformer": "transformer", "vae": "vae"}
    job = messages.generate(room, noise=messages.noise(), components=both, outputs={"out_image": (1, 3, 64, 64)})
    lent.run(job)
    vae = lent.components.get("vae", "vae").match.model
    decoded = direct.decode(vae, room.read(job.out_latents))
    assert decoded.abs().max() > 1.0
    assert torch.equal(room.read(job.out_image), decoded.clamp(-1.0, 1.0))


def test_a_guidance_scale_that_is_left_out_is_the_familys(lent: OneRank, messages: ModuleType) -> None:
    found = []
    for sampling in ({}, {"guidance_scale": 3.5}, {"guidance_scale": 1.0}):
        room = lent.room()
        job = messages.generate(room, noise=messages.noise(), sampling=sampling)
        lent.run(job)
        found.append(room.read(job.out_latents))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_conditioning_is_kept_and_named_and_joined(lent: OneRank, messages: ModuleType) -> None:
    from xditd.ipc.arguments import Repeated, Rows

    given = messages.conditioning()
    room = lent.room()
    sent = {name: room.argument(tensor, f"kept {name}") for name, tensor in given.items()}
    named = {name: Kept(kept_id=f"kept {name}", dtype="float32", shape=tuple(t.shape)) for name, t in given.items()}
    joined = {name: Rows(parts=(Repeated(tensor=leaf, times=2),)) for name, leaf in named.items()}
    first = messages.generate(room, given=sent, noise=messages.noise())
    with pytest.raises(UnknownKept, match="kept prompt_embeds: not known to this worker; send it again"):
        lent.run(messages.generate(lent.room(), given=named, noise=messages.noise()))
    lent.run(first)
    again, both = lent.room(), lent.room()
    second = messages.generate(again, given=named, noise=messages.noise())
    lent.run(second)
    assert torch.equal(again.read(second.out_latents), room.read(first.out_latents))
    third = messages.generate(both, given=joined, noise=messages.noise().expand(2, -1, -1, -1), batch=2)
    lent.run(third)
    assert torch.allclose(both.read(third.out_latents), room.read(first.out_latents), atol=1e-5)
    lent.forget(lent.client)
    with pytest.raises(UnknownKept):
        lent.run(second)


def test_spared_steps_are_counted_for_each_image(lent: OneRank, messages: ModuleType) -> None:
    sampling = {"steps": 3, "sigmas": (1.0, 0.9999, 0.9998), "step_cache_threshold": 0.1}
    job = messages.generate(lent.room(), noise=messages.noise(2), sampling=sampling, batch=2)
    assert lent.run(job).reused_steps == 4
    plain = messages.generate(lent.room(), noise=messages.noise(2), batch=2)
    assert lent.run(plain).reused_steps == 0


def told_otherwise(monkeypatch: pytest.MonkeyPatch, rank: OneRank, **changes: Any) -> None:
    """Let the family say something else of itself."""
    component = rank.components.get("transformer", "transformer")
    facts = msgspec.structs.replace(component.transformer_facts, **changes)
    monkeypatch.setattr(component, "facts", msgspec.structs.replace(component.facts, transformer=facts))


def test_a_family_without_a_step_cache_refuses_one(
    lent: OneRank, messages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_otherwise(monkeypatch, lent, has_step_cache=False)
    cached = messages.generate(lent.room(), noise=messages.noise(), sampling={"step_cache_threshold": 0.1})
    with pytest.raises(Unsupported, match="step_cache: flux1 has none; leave it at 0"):
        lent.run(cached)
    lent.run(messages.generate(lent.room(), noise=messages.noise()))


@pytest.mark.usefixtures("all_cores")
def test_an_image_is_decoded_with_the_scaling_of_the_transformer(
    lent: OneRank, messages: ModuleType, direct: ModuleType, demo_vae: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent.lend("vae", demo_vae)
    scaling = LatentScaling(factor=1.5305, shift=0.0609)
    told = lent.components.get("transformer", "transformer").transformer_facts.latents
    told_otherwise(monkeypatch, lent, latents=msgspec.structs.replace(told, scaling=scaling))
    room = lent.room()
    both = {"transformer": "transformer", "vae": "vae"}
    job = messages.generate(room, noise=messages.noise(), components=both, outputs={"out_image": (1, 3, 64, 64)})
    lent.run(job)
    vae, latents = lent.components.get("vae", "vae").match.model, room.read(job.out_latents)
    image = direct.decode(vae, latents, scaling=scaling).clamp(-1.0, 1.0)
    assert torch.equal(room.read(job.out_image), image)
    assert not torch.equal(image, direct.decode(vae, latents).clamp(-1.0, 1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 4}, "vae: its latents have 16 channels, the transformer's 4; lend that model's VAE"),
        ({"pixels": 16}, "vae: its latents have 8 pixels on a side for each latent, the transformer's 16"),
        ({"space": "other"}, "vae: its latents are of the space flux1, the transformer's of other, and images would"),
    ],
)
def test_a_vae_of_other_latents_is_refused_before_a_step(
    changes: dict[str, int | str],
    message: str,
    lent: OneRank,
    messages: ModuleType,
    demo_vae: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lent.lend("vae", demo_vae)
    both = {"transformer": "transformer", "vae": "vae"}
    job = messages.generate(lent.room(), noise=messages.noise(), components=both, outputs={"out_image": (1, 3, 64, 64)})
    told = lent.components.get("transformer", "transformer").transformer_facts.latents
    with monkeypatch.context() as patched:
        told_otherwise(patched, lent, latents=msgspec.structs.replace(told, **changes))
        with pytest.raises(BadRequest, match=message):
            lent.run(job)
        assert lent.steps == []
    lent.run(job)
    assert lent.steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize("use", ["image", "start", "preview"])
def test_flux1_takes_no_vae_of_wan_whose_latents_have_the_same_shape(
    use: str, lent: OneRank, messages: ModuleType, demo_vae: State
) -> None:
    import wan_vaes

    lent.lend("vae", wan_vaes.state_dict())
    room = lent.room()
    both = {"transformer": "transformer", "vae": "vae"}
    outputs = {"image": {"out_image": (1, 3, 64, 64)}, "preview": {"out_preview": (1, 3, 64, 64)}}.get(use, {})
    start = room.input(torch.zeros(1, 3, 64, 64)) if use == "start" else None
    job = messages.generate(room, noise=messages.noise(), components=both, outputs=outputs)
    job = msgspec.structs.replace(job, start_image=start)
    with pytest.raises(BadRequest, match="vae: its latents are of the space wan_2_1, the transformer's of flux1"):
        lent.run(job)
    assert lent.steps == []


def test_a_soft_mask_of_a_start_is_whole_as_in_the_pipelines(lent: OneRank, messages: ModuleType) -> None:
    from xditd.client.demo.checkpoints import flux_vae_state_dict

    lent.lend("vae", flux_vae_state_dict(1))
    mask = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for each in (mask, (mask >= 0.5).float(), torch.ones_like(mask)):
        room = lent.room()
        starts = {"start_image": room.input(messages.random(1, 3, 64, 64).clamp(-1, 1)), "start_mask": room.input(each)}
        both = {"transformer": "transformer", "vae": "vae"}
        job = messages.generate(room, noise=messages.noise(), components=both, sampling={"strength": 1.0})
        lent.run(msgspec.structs.replace(job, **starts))
        found.append(room.read(job.out_latents))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_options_are_refused_by_name_with_those_that_are_taken(
    lent: OneRank, messages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = messages.generate(lent.room(), noise=messages.noise(), sampling={"options": {"cfg_trunc": 0.5}})
    with pytest.raises(BadRequest, match="options: cfg_trunc cannot be given to flux1; it takes none"):
        lent.run(job)
    told_otherwise(monkeypatch, lent, options=("shift",))
    with pytest.raises(BadRequest, match="options: cfg_trunc cannot be given to flux1; it takes shift"):
        lent.run(job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"height": 120}}, "height 120: use a multiple of 16 up to 8192 pixels"),
        ({"sampling": {"width": limits.MAX_SIDE_PIXELS + 16}}, f"up to {limits.MAX_SIDE_PIXELS} pixels"),
        ({"sampling": {"steps": 0}}, "steps 0: use 1 to 1000"),
        ({"sampling": {"steps": limits.MAX_STEPS + 1}}, f"steps 1001: use 1 to {limits.MAX_STEPS}"),
        ({"sampling": {"variant": "float64_time"}}, "variant 'float64_time': use one of class, float32_time"),
        ({"noise": torch.zeros(1, 16, 8, 9)}, r"noise: shape is \[1, 16, 8, 9\], use \[1, 16, 8, 8\]"),
        ({"noise": torch.full((1, 16, 8, 8), NAN)}, "noise: some values are not finite in float32"),
        ({"noise": None}, "generate: neither noise nor a seed; give one of them"),
        ({"given": {}}, "conditioning: pooled_prompt_embeds, prompt_embeds is missing; it takes"),
        ({"given": {"prompt_embeds": torch.zeros(1, 4, 4096)}}, "conditioning: pooled_prompt_embeds is missing"),
        (
            {"given": {"prompt_embeds": torch.zeros(1, 4, 4096), "pooled": torch.zeros(1, 768)}},
            "conditioning: pooled cannot be given; it takes pooled_prompt_embeds, prompt_embeds",
        ),
        (
            {"given": {"prompt_embeds": torch.zeros(1, 4, 4096), "pooled_prompt_embeds": torch.full((1, 768), NAN)}},
            "pooled_prompt_embeds: some values are not finite",
        ),
        (
            {"given": {"prompt_embeds": 3, "pooled_prompt_embeds": torch.zeros(1, 768)}},
            r"prompt_embeds: int where a tensor is needed, \[1, any, 4096\]",
        ),
        ({"outputs": {"out_latents": (1, 16, 8, 4)}}, r"out_latents: the place for it is \[1, 16, 8, 4\], but the"),
        ({"outputs": {"out_latents": ()}}, "out_latents: a batch of 0, use 1 to 64"),
        ({"outputs": {"out_latents": (65, 16, 8, 8)}}, "out_latents: a batch of 65, use 1 to 64"),
        ({"outputs": {"out_denoised": (1, 16, 4, 8)}}, r"out_denoised: the place for it is \[1, 16, 4, 8\]"),
        ({"components": {}}, "components: a transformer is missing; name one by its id"),
        ({"components": {"vae": "transformer"}}, "components: a transformer is missing"),
        ({"outputs": {"out_image": (1, 3, 64, 64)}}, "components: a vae is missing; name one by its id"),
        (
            {"components": {"transformer": "transformer", "vae": "transformer"}},
            "is a transformer; this job needs a vae",
        ),
    ],
    ids=str,
)
def test_bad_requests_name_the_value(
    lent: OneRank, messages: ModuleType, changes: dict[str, Any], message: str
) -> None:
    job = messages.generate(lent.room(), **{"noise": messages.noise(), **changes})
    with pytest.raises(BadRequest, match=message):
        lent.run(job)
    assert lent.steps == []


def test_a_vae_and_an_image_come_together(lent: OneRank, messages: ModuleType, demo_vae: State) -> None:
    lent.lend("vae", demo_vae)
    both = {"transformer": "transformer", "vae": "vae"}
    with pytest.raises(BadRequest, match="a vae without out_image or a picture would have no effect"):
        lent.run(messages.generate(lent.room(), noise=messages.noise(), components=both))
    job = messages.generate(lent.room(), noise=messages.noise(), components=both, outputs={"out_image": (1, 3, 64, 32)})
    with pytest.raises(BadRequest, match=r"out_image: the place for it is \[1, 3, 64, 32\], but the result will be"):
        lent.run(job)
    assert lent.steps == []


@pytest.mark.parametrize(
    ("steps", "sigmas", "message"),
    [
        (3, (1.0, 0.5), "2 sigmas for 3 steps: give one for each step, without the final 0"),
        (2, (1.0, 0.0), "sigma 0.0: every sigma lies above 0 and at most at 1"),
        (2, (1.5, 0.5), "sigma 1.5"),
        (2, (NAN, 0.5), "sigma nan"),
        (2, (0.5, 0.5), "sigmas do not decrease"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("layout")
def test_bad_schedules_name_the_value(transformer: Any, steps: int, sigmas: tuple[float, ...], message: str) -> None:
    from xditd.gpu_workers.jobs.generation_inputs import to_wanted

    facts = transformer.operations.facts(transformer.config, transformer.layout)
    with pytest.raises(BadRequest, match=message):
        to_wanted(Sampling(height=64, width=64, steps=steps, sigmas=sigmas), 1, facts)


@pytest.mark.usefixtures("layout")
def test_what_a_client_leaves_out_is_filled_in(transformer: Any) -> None:
    from xditd.gpu_workers.jobs.generation_inputs import to_wanted

    facts = msgspec.structs.replace(
        transformer.operations.facts(transformer.config, transformer.layout), default_guidance_scale=4.25
    )
    told = Sampling(height=64, width=80, steps=3, options={"shift": 2.0})
    wanted = to_wanted(told, 2, facts)
    assert (wanted.batch, wanted.height, wanted.width, wanted.steps) == (2, 64, 80, 3)
    assert (wanted.guidance_scale, wanted.sigmas, wanted.variant) == (4.25, None, "class")
    assert wanted.options == {"shift": 2.0}
    assert to_wanted(msgspec.structs.replace(told, guidance_scale=0.0), 2, facts).guidance_scale == 0.0


def test_latents_that_are_not_finite_are_refused_by_step(rank: OneRank, messages: ModuleType) -> None:
    broken = flux1_state_dict(0, double_blocks=1, single_blocks=1)
    broken["img_in.bias"][5] = torch.nan
    rank.lend("transformer", broken)
    with pytest.raises(NotFinite, match=r"transformer transformer \(.*\): latents after step 1 of 2: some values are"):
        rank.run(messages.generate(rank.room(), noise=messages.noise()))


def test_a_good_job_after_bad_ones_has_the_same_bits(lent: OneRank, messages: ModuleType) -> None:
    room = lent.room()
    job: Generate = messages.generate(room, noise=messages.noise())
    lent.run(job)
    first = room.read(job.out_latents)
    for bad in ({"noise": torch.full((1, 16, 8, 8), NAN)}, {"sampling": {"steps": 0}}):
        with pytest.raises(BadRequest):
            lent.run(messages.generate(lent.room(), **{"noise": messages.noise(), **bad}))
    lent.run(job)
    assert torch.equal(room.read(job.out_latents), first)
