"""ControlNets in ``Generate``: the bits of diffusers' pipeline on one rank, and every refusal by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from flux1_controlnets import MODES, comfyui_state, diffusers_state, reference_model
from flux1_variants import HEIGHT, WIDTH, numbers, state_of, text

from xditd.client.demo.checkpoints import flux1_state_dict, flux_vae_state_dict
from xditd.gpu_workers.families.flux1 import reference
from xditd.ipc.arguments import ListOf
from xditd.ipc.errors import BadRequest, NotFinite, UnknownComponent, Unsupported
from xditd.ipc.job_parts import Control, Sampling
from xditd.ipc.requests import Generate

if TYPE_CHECKING:
    from one_rank import OneRank

    from xditd.gpu_workers.parallel.layouts import ParallelLayout

State = dict[str, torch.Tensor]
STEPS = 3
LATENTS = (16, HEIGHT // 8, WIDTH // 8)


def pipeline_of(state: State, controlnet: Any, vae: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetPipeline

    from xditd.gpu_workers.families.flux1.config import DEV_SCHEDULER

    rest = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipeline = FluxControlNetPipeline(
        FlowMatchEulerDiscreteScheduler(**DEV_SCHEDULER),
        vae,
        transformer=reference.transformer_from(state),
        controlnet=controlnet,
        **rest,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generated(
    rank: OneRank,
    controls: list[dict[str, Any]],
    *,
    given: dict[str, Any],
    sampling: dict[str, Any] | None = None,
    noise: torch.Tensor | None = None,
    has_vae: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Run a job; pictures and latents of ``controls`` are tensors."""
    room = rank.room()
    batch = given["prompt_embeds"].shape[0]
    used = [
        {name: room.input(each) if isinstance(each, torch.Tensor) else each for name, each in control.items()}
        for control in controls
    ]
    written = {name: room.argument(each) if isinstance(each, torch.Tensor) else each for name, each in given.items()}
    placed: dict[str, Any] = {"noise": None if noise is None else room.input(noise)}
    out = room.output(batch, *LATENTS, dtype=dtype)
    components: Any = {"transformer": "transformer"}
    if has_vae:
        components["vae"] = "vae"
        placed["out_image"] = room.output(batch, 3, HEIGHT, WIDTH)
    job = Generate(
        request_id="r",
        components=components,
        conditioning=written,
        controls=tuple(Control(**each) for each in used),
        sampling=Sampling(
            **{"height": HEIGHT, "width": WIDTH, "steps": STEPS, "guidance_scale": 3.5, **(sampling or {})}
        ),
        io=room.block(),
        out_latents=out,
        **placed,
    )
    rank.run(job)
    return room.read(out)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(packed, HEIGHT, WIDTH, 8)


@pytest.mark.parametrize(
    ("dtype", "batch", "naming"),
    [
        (torch.float32, 1, "diffusers"),
        (torch.float32, 2, "comfyui"),
        (torch.bfloat16, 1, "comfyui"),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (
                (torch.float32, 1, "comfyui"),
                (torch.float32, 2, "diffusers"),
                (torch.bfloat16, 1, "diffusers"),
            )
        ),
    ],
)
def test_a_union_has_the_bits_of_the_pipeline_with_pictures_of_the_seed(
    rank: OneRank, naming: str, dtype: torch.dtype, batch: int
) -> None:
    state, union = flux1_state_dict(1, dtype=dtype), comfyui_state(2, modes=MODES, dtype=dtype)
    vae_state, picture = flux_vae_state_dict(1, dtype=dtype), numbers(4, 1, 3, HEIGHT, WIDTH).clamp(-1, 1)
    given = {name: each.to(dtype) for name, each in text(batch).items()}
    expected = pipeline_of(state, reference_model(union), reference.vae_from(vae_state))(
        control_image=picture, control_mode=2, controlnet_conditioning_scale=0.6,
        generator=torch.Generator().manual_seed(7), height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
        guidance_scale=3.5, output_type="latent", **given,
    ).images  # fmt: skip
    rank.lend("transformer", state)
    rank.lend("controlnet", union if naming == "comfyui" else diffusers_state(union))
    rank.lend("vae", vae_state)
    control = {"component_id": "controlnet", "scale": 0.6, "mode": 2, "image": picture}
    found = generated(rank, [control], given=given, sampling={"seed": 7}, has_vae=True, dtype=dtype)
    assert torch.equal(found, unpacked(expected))
    assert not torch.equal(found, generated(rank, [], given=given, sampling={"seed": 7}, dtype=dtype))


def test_it_has_the_epsilon_of_the_transformer_s_variant(rank: OneRank) -> None:
    """ComfyUI's ControlNets have its query and key norms, too."""
    state, single = flux1_state_dict(1), comfyui_state(3, double_blocks=2, single_blocks=1)
    picture, noise = numbers(4, 1, 3, HEIGHT, WIDTH).clamp(-1, 1), numbers(3, 1, *LATENTS)
    vae = reference.vae_from(flux_vae_state_dict(1))
    pipeline = pipeline_of(state, reference_model(single), vae)
    latents = vae.encode(picture).latent_dist.sample(torch.Generator().manual_seed(7))
    latents = (latents - reference.SHIFT) * reference.SCALING
    rank.lend("transformer", state)
    rank.lend("controlnet", single)
    control = {"component_id": "controlnet", "scale": 0.7, "latents": latents}
    found = {
        variant: generated(rank, [control], given=text(1), noise=noise, sampling={"variant": variant})
        for variant in ("class", "float32_time", "class")
    }
    for variant in ("class", "float32_time"):
        expected = pipeline(
            control_image=picture, controlnet_conditioning_scale=0.7, generator=torch.Generator().manual_seed(7),
            height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=3.5,
            latents=pipeline._pack_latents(noise, *noise.shape), output_type="latent", **text(1),
        ).images  # fmt: skip
        assert torch.equal(found[variant], unpacked(expected)), variant
        for model in (pipeline.transformer, pipeline.controlnet):
            for path, each in model.named_modules():
                if path.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                    each.eps = None  # torch's default, that of float32
    assert not torch.equal(*found.values())


@pytest.mark.parametrize(
    ("start", "end", "blocks"),
    [
        (0.0, 1.0, (1, 0)),
        (0.4, 1.0, (2, 1)),
        (0.0, 0.5, (2, 1)),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in ((0.0, 1.0, (2, 1)), (0.4, 1.0, (1, 0)), (0.0, 0.5, (1, 0)))
        ),
    ],
)
def test_a_single_controlnet_has_the_bits_of_the_pipeline_with_latents(
    rank: OneRank, blocks: tuple[int, int], start: float, end: float
) -> None:
    state = flux1_state_dict(1)
    single = comfyui_state(3, double_blocks=blocks[0], single_blocks=blocks[1])
    vae, picture, noise = (
        reference.vae_from(flux_vae_state_dict(1)),
        numbers(4, 1, 3, HEIGHT, WIDTH).clamp(-1, 1),
        numbers(3, 1, *LATENTS),
    )
    pipeline = pipeline_of(state, reference_model(single), vae)
    latents = vae.encode(picture).latent_dist.sample(torch.Generator().manual_seed(7))
    latents = (latents - reference.SHIFT) * reference.SCALING
    expected = pipeline(
        control_image=picture, controlnet_conditioning_scale=0.7, control_guidance_start=start,
        control_guidance_end=end, generator=torch.Generator().manual_seed(7), height=HEIGHT, width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=3.5, latents=pipeline._pack_latents(noise, *noise.shape), output_type="latent", **text(1),
    ).images  # fmt: skip
    rank.lend("transformer", state)
    rank.lend("controlnet", diffusers_state(single))
    control = {"component_id": "controlnet", "scale": 0.7, "start": start, "end": end, "latents": latents}
    assert torch.equal(generated(rank, [control], given=text(1), noise=noise), unpacked(expected))


def test_several_controlnets_have_the_bits_of_the_pipeline(rank: OneRank) -> None:
    """Two are of one architecture, a third is of another."""
    from diffusers import FluxMultiControlNetModel

    state, vae_state = flux1_state_dict(1), flux_vae_state_dict(1)
    states = [comfyui_state(2, modes=MODES), comfyui_state(3, modes=MODES), comfyui_state(4, modes=MODES + 1)]
    pictures = [numbers(seed, 1, 3, HEIGHT, WIDTH).clamp(-1, 1) for seed in (4, 5, 6)]
    scales, modes, starts, ends = [0.4, 0.5, 0.3], [1, 0, 4], [0.0, 0.3, 0.0], [1.0, 1.0, 0.7]
    nets = FluxMultiControlNetModel([reference_model(each) for each in states])
    expected = pipeline_of(state, nets, reference.vae_from(vae_state))(
        control_image=pictures, control_mode=modes, controlnet_conditioning_scale=scales, control_guidance_start=starts,
        control_guidance_end=ends, generator=torch.Generator().manual_seed(7), height=HEIGHT, width=WIDTH,
        num_inference_steps=STEPS, guidance_scale=3.5, output_type="latent", **text(1),
    ).images  # fmt: skip
    rank.lend("transformer", state)
    rank.lend("vae", vae_state)
    for number, each in enumerate(states):
        rank.lend(f"controlnet {number}", diffusers_state(each))
    controls = [
        {
            "component_id": f"controlnet {n}",
            "scale": scales[n],
            "mode": modes[n],
            "start": starts[n],
            "end": ends[n],
            "image": pictures[n],
        }
        for n in range(3)
    ]
    assert torch.equal(generated(rank, controls, given=text(1), sampling={"seed": 7}, has_vae=True), unpacked(expected))


def test_two_controlnets_of_one_architecture_stay_plugged(rank: OneRank) -> None:
    rank.lend("transformer", flux1_state_dict(1))
    for number in range(2):
        rank.lend(f"controlnet {number}", comfyui_state(number))
    controls = [{"component_id": f"controlnet {number}", "latents": CONTROL} for number in range(2)]
    plugs, built = rank.components.plugs, rank.components.models.built
    both = generated(rank, controls, given=text(1), noise=numbers(3, 1, *LATENTS))
    assert rank.components.plugs == plugs
    # A model that is free again is used again: a third takes the place of the first, and nothing is built.
    rank.components.unmap("controlnet 0")
    rank.lend("controlnet 2", comfyui_state(0))
    rank.lend("controlnet 1", comfyui_state(1))  # lent again: in its own model
    again = [{"component_id": f"controlnet {number}", "latents": CONTROL} for number in (2, 1)]
    plugs = rank.components.plugs
    assert torch.equal(generated(rank, again, given=text(1), noise=numbers(3, 1, *LATENTS)), both)
    assert (rank.components.plugs, rank.components.models.built) == (plugs, built)


@pytest.mark.parametrize("name", ["controlnet_blocks.0.weight", "single_blocks.1.linear2.bias"])
def test_a_weight_that_is_not_finite_is_that_of_the_controlnet(rank: OneRank, name: str) -> None:
    state = comfyui_state(3)
    state[name].view(-1)[3] = torch.nan
    rank.lend("transformer", flux1_state_dict(1))
    rank.lend("broken", state)
    rank.lend("sound", comfyui_state(4))
    controls = [{"component_id": each, "latents": CONTROL} for each in ("sound", "broken")]
    with pytest.raises(NotFinite, match=r"^controlnet broken .*: residuals: some values are NaN"):
        generated(rank, controls, given=text(1), noise=numbers(3, 1, *LATENTS))
    assert generated(rank, controls[:1], given=text(1), noise=numbers(3, 1, *LATENTS)).isfinite().all()


def test_a_weight_of_the_transformer_that_is_not_finite_is_its_own(rank: OneRank) -> None:
    state = flux1_state_dict(1)
    state["final_layer.linear.bias"][3] = torch.nan
    rank.lend("transformer", state)
    rank.lend("sound", comfyui_state(4))
    control = {"component_id": "sound", "latents": CONTROL}
    with pytest.raises(NotFinite, match=r"^transformer transformer .*: latents after step 1 of 3"):
        generated(rank, [control], given=text(1), noise=numbers(3, 1, *LATENTS))


def test_a_controlnet_of_no_steps_or_scale_changes_nothing(rank: OneRank) -> None:
    rank.lend("transformer", flux1_state_dict(1))
    rank.lend("controlnet", comfyui_state(3))
    noise, latents = numbers(3, 1, *LATENTS), numbers(4, 1, *LATENTS)
    plain = generated(rank, [], given=text(1), noise=noise)
    for off in ({"scale": 0.0}, {"start": 0.4, "end": 0.5}):
        control = {"component_id": "controlnet", "latents": latents, **off}
        assert torch.equal(generated(rank, [control], given=text(1), noise=noise), plain)
    control = {"component_id": "controlnet", "latents": latents}
    assert not torch.equal(generated(rank, [control], given=text(1), noise=noise), plain)


@pytest.fixture(scope="module")
def refusing(layout: ParallelLayout) -> Iterator[OneRank]:
    """A rank with a transformer, a union ControlNet and two others."""
    import one_rank

    rank = one_rank.OneRank(layout)
    rank.lend("transformer", flux1_state_dict(1))
    rank.lend("controlnet", comfyui_state(3, modes=MODES, double_blocks=1, single_blocks=1))
    rank.lend("single", comfyui_state(3, double_blocks=1, single_blocks=1))
    rank.lend("wide", comfyui_state(3, double_blocks=1, single_blocks=1, heads=3))
    yield rank
    rank.close()


PICTURE = numbers(4, 1, 3, HEIGHT, WIDTH).clamp(-1, 1)
CONTROL = numbers(4, 1, *LATENTS)


@pytest.mark.parametrize(
    ("control", "error", "message"),
    [
        ({"latents": CONTROL}, BadRequest, r"controls\[0\].*a union ControlNet needs the kind.*from 0 to 3"),
        ({"latents": CONTROL, "mode": 4}, BadRequest, r"controls\[0\].*mode 4: this ControlNet has the modes 0 to 3"),
        ({"mode": 1}, BadRequest, r"controls\[0\].*give either the picture or its latents"),
        ({"mode": 1, "latents": CONTROL, "image": PICTURE}, BadRequest, "give either the picture or its latents"),
        ({"mode": 1, "image": PICTURE}, BadRequest, r"controls\[0\].image: a picture is encoded by.*VAE"),
        ({"mode": 1, "latents": CONTROL[:, :, :4]}, BadRequest, r"controls\[0\].latents: shape is \[1, 16, 4, 12\]"),
        ({"mode": 1, "latents": CONTROL.repeat(3, 1, 1, 1)}, BadRequest, "3 rows for a batch of 1"),
        ({"mode": 1, "latents": torch.full_like(CONTROL, torch.nan)}, BadRequest, r"controls\[0\]: latents"),
        ({"mode": 1, "latents": CONTROL, "start": 0.6, "end": 0.5}, BadRequest, "start 0.6: it is after the end 0.5"),
        ({"mode": 1, "latents": CONTROL, "component_id": "gone"}, UnknownComponent, "component gone"),
        ({"mode": 1, "latents": CONTROL, "component_id": "transformer"}, BadRequest, "needs a controlnet"),
        ({"mode": 1, "latents": CONTROL, "component_id": "single"}, BadRequest, "mode 1:.*leave the mode out"),
        ({"latents": CONTROL, "component_id": "wide"}, BadRequest, "residuals have 384 channels.*blocks 256"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_wrong_controls_are_refused_by_name(
    refusing: OneRank, control: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generated(refusing, [{"component_id": "controlnet", **control}], given=text(1), noise=numbers(3, 1, *LATENTS))


def test_a_picture_of_another_size_is_refused(rank: OneRank) -> None:
    rank.lend("transformer", flux1_state_dict(1))
    rank.lend("controlnet", comfyui_state(3))
    rank.lend("vae", flux_vae_state_dict(1))
    control = {"component_id": "controlnet", "image": PICTURE[..., :64]}
    with pytest.raises(BadRequest, match=r"controls\[0\].image: shape is \[1, 3, 64, 64\], use \[any, 3, 64, 96\]"):
        generated(rank, [control], given=text(1), sampling={"seed": 1}, has_vae=True)


def test_what_no_pipeline_does_is_refused_by_name(rank: OneRank) -> None:
    rank.lend("controlnet", comfyui_state(3))
    rank.lend("other", comfyui_state(3, double_blocks=1))
    noise, control = numbers(3, 1, *LATENTS), {"component_id": "controlnet", "latents": CONTROL}
    rank.lend("transformer", flux1_state_dict(1))
    with pytest.raises(Unsupported, match=r"controls\[0\] gives 2 and 2 residuals, and controls\[1\] 1 and 2"):
        generated(rank, [control, {**control, "component_id": "other"}], given=text(1), noise=noise)
    with pytest.raises(Unsupported, match="step_cache: it skips the blocks"):
        generated(rank, [control], given=text(1), noise=noise, sampling={"step_cache_threshold": 0.1})
    with pytest.raises(Unsupported, match="reference_latents with ControlNets"):
        generated(rank, [control], given={**text(1), "reference_latents": ListOf(items=())}, noise=noise)


def test_a_variant_that_no_pipeline_runs_with_controlnets_is_refused(rank: OneRank) -> None:
    rank.lend("controlnet", comfyui_state(3))
    rank.lend("transformer", state_of(128))
    noise, control = numbers(3, 1, *LATENTS), {"component_id": "controlnet", "latents": CONTROL}
    with pytest.raises(Unsupported, match=r"128 input channels.*with ControlNets"):
        generated(rank, [control], given={**text(1), "control_latents": CONTROL}, noise=noise)
