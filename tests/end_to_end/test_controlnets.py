"""ControlNets for FLUX.1 through a real daemon with two workers, beside diffusers' pipeline and classes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import z_image_models
from flux1_controlnets import MODES, comfyui_state, diffusers_state, reference_model
from nested_values import cast
from safetensors.torch import save_file

from xditd.client import BadRequest, CallControl, Client, Control, LeaseLost, UnknownComponent
from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.gpu_workers.families.flux1 import reference

BAR = 1e-6
HEIGHT, WIDTH = 64, 96


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT = {"prompt_embeds": drawn(1, 1, 15, 4096), "pooled_prompt_embeds": drawn(2, 1, 768)}
PICTURES = [drawn(seed, 1, 3, HEIGHT, WIDTH).clamp(-1, 1) for seed in (3, 4)]


@pytest.fixture(scope="module")
def states() -> list[dict[str, torch.Tensor]]:
    return [comfyui_state(5, modes=MODES), comfyui_state(6, modes=MODES)]


@pytest.fixture
def lent(client: Client, files: SimpleNamespace, states: Any, tmp_path: Any) -> Any:
    unions = []
    for number, state in enumerate(states):
        save_file(diffusers_state(state), tmp_path / f"union{number}.safetensors")
        unions.append(client.lend(tmp_path / f"union{number}.safetensors"))
    return SimpleNamespace(transformer=client.lend(files.transformer), vae=client.lend(files.vae), unions=unions)


def test_a_generation_with_two_has_the_latents_of_the_pipeline(
    client: Client, lent: Any, files: SimpleNamespace, states: Any, relative_error: Callable[..., float]
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetPipeline, FluxMultiControlNetModel

    from xditd.gpu_workers.families.flux1.config import DEV_SCHEDULER

    rest = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipeline = FluxControlNetPipeline(
        FlowMatchEulerDiscreteScheduler(**DEV_SCHEDULER), reference.load_vae(files.vae),
        transformer=reference.load_transformer(files.transformer),
        controlnet=FluxMultiControlNetModel([reference_model(each) for each in states]), **rest,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    packed = pipeline(
        control_image=PICTURES, control_mode=[1, 3], controlnet_conditioning_scale=[0.5, 0.4], height=HEIGHT,
        control_guidance_start=[0.0, 0.3], control_guidance_end=[1.0, 1.0], width=WIDTH, num_inference_steps=3,
        guidance_scale=3.5, generator=torch.Generator().manual_seed(7), output_type="latent", **TEXT,
    ).images  # fmt: skip
    expected = pipeline._unpack_latents(packed, HEIGHT, WIDTH, 8)
    controls = [
        Control(lent.unions[0], PICTURES[0], scale=0.5, mode=1),
        Control(lent.unions[1].component_id, PICTURES[1], scale=0.4, mode=3, start=0.3),
    ]
    job = {"vae": lent.vae, "height": HEIGHT, "width": WIDTH, "steps": 3, "guidance_scale": 3.5, "seed": 7}
    found = client.generate(lent.transformer, TEXT, controls=controls, **job).result()
    assert relative_error(found.latents, expected) <= BAR
    assert found.image is not None
    plain = client.generate(lent.transformer, TEXT, **job).result()
    assert relative_error(plain.latents, expected) > 0.01
    again = client.generate(lent.transformer, TEXT, controls=controls, **job).result()
    assert torch.equal(again.latents, found.latents)


@pytest.mark.parametrize("kind", [None, "controlnet"])
def test_two_folders_of_one_architecture_have_the_latents_of_their_files(
    kind: str | None, client: Client, lent: Any, states: Any, tmp_path: Any
) -> None:
    folders = [tmp_path / "union_a", tmp_path / "union_b"]
    for folder, state in zip(folders, states, strict=True):
        reference_model(state).save_pretrained(folder)
    unions = [client.lend(folder, kind=kind) for folder in folders]
    assert [each.family for each in unions] == [each.family for each in lent.unions]
    job = {"height": HEIGHT, "width": WIDTH, "steps": 2, "guidance_scale": 3.5, "seed": 7, "vae": lent.vae}

    def latents(of: Any) -> torch.Tensor:
        controls = [Control(each, picture, mode=1) for each, picture in zip(of, PICTURES, strict=True)]
        return client.generate(lent.transformer, TEXT, controls=controls, **job).result().latents

    expected = latents(lent.unions)
    for each in lent.unions:
        each.return_()
    assert torch.equal(latents(unions), expected)


def _rows_of(given: dict[str, Any], rows: int) -> dict[str, Any]:
    return {
        name: each if name.endswith("_ids") else each.repeat(rows, *[1] * (each.ndim - 1))
        for name, each in given.items()
    }


def test_a_call_gives_what_the_classes_give(
    client: Client, lent: Any, files: SimpleNamespace, states: Any, relative_error: Callable[..., float]
) -> None:
    tokens = 24
    shared = {
        "encoder_hidden_states": TEXT["prompt_embeds"], "pooled_projections": TEXT["pooled_prompt_embeds"],
        "timestep": torch.tensor([0.7]), "guidance": torch.tensor([3.5]), "txt_ids": torch.zeros(15, 3),
    }  # fmt: skip
    places = torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(6.0), indexing="ij")
    ids = torch.stack(places, -1).view(-1, 3)
    image, picture = drawn(8, 1, tokens, 64), drawn(9, 1, tokens, 64)
    of_control = {**shared, "hidden_states": image, "controlnet_cond": picture, "img_ids": ids}
    of_control["controlnet_mode"] = torch.tensor([[2]])
    later = ids[:6] + 1
    references = drawn(10, 1, 6, 64)
    given = {**shared, "hidden_states": torch.cat([image, references], 1), "img_ids": torch.cat([ids, later])}
    control = CallControl(lent.unions[0], of_control, 0.5, {"controlnet_block_samples": [1, 0]})
    (found,) = client.call(lent.transformer, given, controls=[control])
    with torch.no_grad():
        double, _ = reference_model(states[0])(**of_control, return_dict=False)
        padded = [torch.cat([0.5 * double[number], torch.zeros(1, 6, 256)], 1) for number in (1, 0)]
        model = reference.load_transformer(files.transformer)
        (expected,) = model(**given, controlnet_block_samples=padded, return_dict=False)
    assert relative_error(found, expected) <= BAR
    for wrong, message in (
        ({"controlnet_mode": torch.tensor([[MODES]])}, f"mode {MODES}: this ControlNet has the modes 0 to 3"),
        ({"controlnet_cond": picture[:, :4]}, r"controlnet_cond: shape is \[1, 4, 64\], use \[1, 24, 64\]"),
        ({"hidden_states": drawn(8, 1, 40, 64)}, r"controlnet_cond: shape is \[1, 24, 64\], use \[1, 40, 64\]"),
        (_rows_of(of_control, 2), "residuals of 2 rows of 24 tokens for 1 of 30; give the ControlNet the rows"),
        ({"extra": 1}, r"controls\[0\].arguments: extra cannot be given"),
    ):
        with pytest.raises(BadRequest, match=message):
            client.call(lent.transformer, given, controls=[CallControl(lent.unions[0], {**of_control, **wrong})])
    more = CallControl(lent.unions[0], of_control, blocks={"controlnet_block_samples": [0, 2]})
    with pytest.raises(BadRequest, match="there is no residual 2"):
        client.call(lent.transformer, given, controls=[more])


def test_one_of_another_dtype_than_the_transformer_is_refused(
    client: Client, lent: Any, states: Any, tmp_path: Any
) -> None:
    starts = client.status().counters.group_starts
    for dtype in (torch.bfloat16, torch.float16):
        reference_model(states[0]).to(dtype).save_pretrained(tmp_path / str(dtype))
    half, other = (client.lend(tmp_path / str(dtype)) for dtype in (torch.bfloat16, torch.float16))
    transformer = client.lend({name: each.bfloat16() for name, each in flux1_state_dict(0, heads=2).items()})
    for of, control, message in (
        (lent.transformer, half, "the ControlNet is bfloat16, and the transformer is float32; lend a ControlNet in"),
        (transformer, other, "the ControlNet is float16, and the transformer is bfloat16"),
        (transformer, lent.unions[0], "the ControlNet is float32, and the transformer is bfloat16"),
    ):
        picture = Control(control, latents=drawn(5, 1, 16, HEIGHT // 8, WIDTH // 8), mode=1)
        with pytest.raises(BadRequest, match=rf"controls\[0\]: {message}"):
            client.generate(of, TEXT, controls=[picture], height=HEIGHT, width=WIDTH, steps=1, seed=1).result()
    given = call_arguments(torch.bfloat16)
    arguments = call_arguments(torch.float32) | {"controlnet_cond": drawn(9, 1, 24, 64)}
    arguments["controlnet_mode"] = torch.tensor([[2]])
    with pytest.raises(BadRequest, match=r"controls\[0\]: the ControlNet is float32, and the transformer is bfloat16"):
        client.call(transformer, given, controls=[CallControl(lent.unions[0], arguments)])
    (found,) = client.call(  # the residuals become float32, as in the class
        lent.transformer, call_arguments(torch.float32),
        controls=[CallControl(half, cast(arguments, torch.bfloat16))],
    )  # fmt: skip
    assert found.dtype == torch.float32
    assert client.status().counters.group_starts == starts


def call_arguments(dtype: torch.dtype) -> dict[str, Any]:
    places = torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(6.0), indexing="ij")
    return {
        "hidden_states": drawn(8, 1, 24, 64).to(dtype),
        "encoder_hidden_states": TEXT["prompt_embeds"].to(dtype),
        "pooled_projections": TEXT["pooled_prompt_embeds"].to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype),
        "txt_ids": torch.zeros(15, 3),
        "img_ids": torch.stack(places, -1).view(-1, 3),
    }


def test_what_does_not_fit_is_refused_and_loans_end(client: Client, lent: Any, tmp_path: Any) -> None:
    job: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "steps": 1, "seed": 1}
    latents = drawn(5, 1, 16, HEIGHT // 8, WIDTH // 8)
    control = Control(lent.unions[0], latents=latents, mode=1)
    with pytest.raises(BadRequest, match=r"controls\[0\].image: .*vae"):
        client.generate(lent.transformer, TEXT, controls=[Control(lent.unions[0], PICTURES[0], mode=1)], **job)
    with pytest.raises(BadRequest, match="is a controlnet; name a transformer"):
        client.generate(lent.unions[0], TEXT, **job)
    with pytest.raises(BadRequest, match=r"^transformer_2: .* is a controlnet; name a transformer"):
        client.generate(lent.transformer, TEXT, transformer_2=lent.unions[0], **job)
    with pytest.raises(BadRequest, match=r"^controls\[0\].controlnet: .* is a transformer; name a controlnet"):
        client.generate(lent.transformer, TEXT, controls=[Control(lent.transformer, latents=latents)], **job)
    save_file(z_image_models.state_dict(1), tmp_path / "z.safetensors")
    other = client.lend(tmp_path / "z.safetensors")
    embeds = {"prompt_embeds": [drawn(1, 9, z_image_models.SMALL.text_channels)]}
    with pytest.raises(BadRequest, match="flux1_controlnet gives residuals for flux1, and the transformer is z_image"):
        client.generate(other, embeds, controls=[control], **job).result()
    assert {each.kind.value for each in client.status().components if each.kind} >= {"controlnet", "transformer", "vae"}
    lent.unions[0].return_()
    with pytest.raises(LeaseLost):
        client.generate(lent.transformer, TEXT, controls=[control], **job)
    gone = Control(lent.unions[0].component_id, latents=latents, mode=1)
    with pytest.raises((UnknownComponent, LeaseLost, BadRequest)):
        client.generate(lent.transformer, TEXT, controls=[gone], **job).result()


def test_values_of_pictures_and_masks_are_refused_by_name(client: Client, lent: Any) -> None:
    job: dict[str, Any] = {"vae": lent.vae, "height": HEIGHT, "width": WIDTH, "steps": 1, "seed": 1}
    nowhere = torch.full((1, 3, HEIGHT, WIDTH), float("nan"))
    control = Control(lent.unions[0], nowhere, mode=1)
    with pytest.raises(BadRequest, match=r"^controls\[0\].image: some values are not finite"):
        client.generate(lent.transformer, TEXT, controls=[control], **job).result()
    with pytest.raises(BadRequest, match=r"^start_image: some values are not finite"):
        client.generate(lent.transformer, TEXT, start_image=nowhere, **job).result()
    for value in (-1.0, 2.0):
        mask = torch.full((1, 1, HEIGHT, WIDTH), value)
        with pytest.raises(BadRequest, match=f"^start_mask: values from {value:g} to {value:g}, use 0 to 1"):
            client.generate(lent.transformer, TEXT, start_image=PICTURES[0], start_mask=mask, **job).result()
