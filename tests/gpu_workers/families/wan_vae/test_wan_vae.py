"""The VAEs of Wan and Qwen-Image: key maps of both namings, decode and encode beside diffusers, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import wan_vaes
from wan_vaes import CONFIGS, NAMINGS, SMALL, SMALL_2_2, State

from xditd.gpu_workers.families.wan_vae.checkpoint import WanVae
from xditd.gpu_workers.families.wan_vae.config import WAN_2_1, WanVaeConfig
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported

Plugger = Callable[[ModelCache, State], CheckpointMatch]
FULL = {
    "wan 2.1": WanVaeConfig(width=96),
    "wan 2.2": WanVaeConfig(width=256, is_wan_2_2=True, encoder_width=160),
}


def infos(state: State) -> dict[str, TensorInfo]:
    return {name: TensorInfo.of(tensor) for name, tensor in state.items()}


def fitted(given: dict[str, TensorInfo]) -> Resolution:
    return resolve(detect(given.keys()), given)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> WanVaeConfig:
    return CONFIGS[request.param]


@pytest.fixture(params=NAMINGS)
def state(request: pytest.FixtureRequest, config: WanVaeConfig) -> State:
    return wan_vaes.state_dict(request.param, config)


@pytest.fixture
def model(shared_cache: ModelCache, state: State, plug: Plugger) -> CachedModel:
    return plug(shared_cache, state).model


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_every_element_is_that_of_diffusers(state: State, config: WanVaeConfig, prefix: str) -> None:
    given = {prefix + name: tensor for name, tensor in state.items()}
    found = fitted(infos(given))
    assert (found.family.name, found.config) == ("wan_vae", config)
    expected = wan_vaes.reference(state, config).state_dict()
    assert found.key_map.keys() == expected.keys()
    for target, part in found.key_map.items():
        ours = given[part.source][part.start : part.stop]
        assert torch.equal(ours.view(part.shape or ours.shape), expected[target]), target


@pytest.mark.parametrize("names", NAMINGS.values(), ids=NAMINGS)
@pytest.mark.parametrize("release", FULL)
def test_the_full_size_is_the_class_s(names: tuple[str, ...], release: str) -> None:
    from diffusers import AutoencoderKLWan

    config = FULL[release]
    with torch.device("meta"):
        module = AutoencoderKLWan(**wan_vaes.TI2V if config.is_wan_2_2 else {})
    entries = list(WanVae().entries(config, names))
    check_targets(WanVae(), iter(entries), {name: tuple(each.shape) for name, each in module.named_parameters()})
    given = {entry.source: TensorInfo("bfloat16", entry.shape) for entry in entries}
    assert fitted(given).config == config
    if not config.is_wan_2_2:
        assert (tuple(module.config.latents_mean), tuple(module.config.latents_std)) == (
            WAN_2_1.means, WAN_2_1.deviations
        )  # fmt: skip


@pytest.mark.parametrize("class_name", ["AutoencoderKLQwenImage", "AutoencoderKLWan"])
@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 5, 3)])
def test_an_image_has_the_bits_of_the_pipeline(
    model: CachedModel, state: State, config: WanVaeConfig, shape: tuple[int, ...], class_name: str
) -> None:
    import direct_jobs

    if config.is_wan_2_2 and class_name != "AutoencoderKLWan":
        pytest.skip("Qwen-Image has no such VAE")
    vae = wan_vaes.reference(state, config, class_name=class_name)
    batch, height, width = shape
    channels, pixels = config.release.channels, config.release.pixels
    latents = 0.5 * torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
    expected = wan_vaes.reference_decode(vae, config, latents.unsqueeze(2))[:, :, 0]
    found = direct_jobs.decode(model, latents)
    assert found.shape == (batch, 3, height * pixels, width * pixels)
    assert found.abs().max() > 1  # what the class clamps
    assert torch.equal(found.clamp(-1, 1), expected)
    image = torch.rand(expected.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    right = wan_vaes.reference_encode(vae, config, image.unsqueeze(2), is_image=True)[:, :, 0]
    assert torch.equal(direct_jobs.encode(model, image), right)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_decoder_alone_decodes_and_does_not_encode(
    shared_cache: ModelCache, plug: Plugger, config: WanVaeConfig
) -> None:
    import direct_jobs

    whole = wan_vaes.state_dict("original", config)
    decoder = {name: each for name, each in whole.items() if not name.startswith(("encoder.", "conv1."))}
    channels = config.release.channels
    latents = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = direct_jobs.decode(plug(shared_cache, whole).model, latents)
    model = plug(shared_cache, decoder).model
    width = config.width if config.is_wan_2_2 else 0
    assert model.config == replace(config, has_encoder=False, encoder_width=width)
    assert torch.equal(direct_jobs.decode(model, latents), expected)
    with pytest.raises(Unsupported, match="lent without its encoder tensors"):
        direct_jobs.encode(model, torch.zeros(1, 3, 32, 32))


def test_wrong_shapes_are_refused(model: CachedModel, config: WanVaeConfig) -> None:
    import direct_jobs

    channels, pixels = config.release.channels, config.release.pixels
    takes = rf"use \[batch, {channels}, height / {pixels}, width / {pixels}\]"
    with pytest.raises(BadRequest, match=rf"latents are \[1, 4, 4, 4\]: {takes}"):
        direct_jobs.decode(model, torch.zeros(1, 4, 4, 4))
    with pytest.raises(BadRequest, match=r"image is \[1, 4, 32, 32\]: use \[batch, 3, height, width\]"):
        direct_jobs.encode(model, torch.zeros(1, 4, 32, 32))
    with pytest.raises(BadRequest, match=f"height 20: use a multiple of {pixels}"):
        direct_jobs.encode(model, torch.zeros(1, 3, 20, 32))


def test_faults_and_relatives_are_named(state: State, config: WanVaeConfig) -> None:
    given = infos(state)
    name = "conv2.weight" if "conv2.weight" in given else "post_quant_conv.weight"
    with pytest.raises(BadCheckpoint, match=f"1 missing: {name}"):
        fitted({other: info for other, info in given.items() if other != name})
    last = "decoder.head.2" if "decoder.head.2.bias" in given else "decoder.conv_out"
    shape = given[f"{last}.weight"].shape
    of_four = {
        f"{last}.weight": TensorInfo("float32", (4, *shape[1:])),
        f"{last}.bias": TensorInfo("float32", (4,)),
    }
    planes = config.release.planes
    with pytest.raises(Unsupported, match=rf"images of 4 channels, not {planes} \(Qwen-Image-Layered's"):
        fitted({**given, **of_four})


def test_a_tensor_of_the_other_release_is_named() -> None:
    given = infos(wan_vaes.state_dict("original", SMALL_2_2))
    other = infos(wan_vaes.state_dict("original", SMALL))
    name = "decoder.upsamples.12.residual.2.weight"
    with pytest.raises(BadCheckpoint, match=name):
        fitted({**given, name: other[name]})


@pytest.mark.parametrize("size", [(1, 4, 6), (2, 3, 5), (4, 2, 3)])
def test_a_video_is_decoded_and_encoded_as_wan_s_class_does(
    model: CachedModel, state: State, config: WanVaeConfig, size: Any
) -> None:
    import direct_jobs

    module = wan_vaes.reference(state, config)
    frames, height, width = size
    latents = torch.randn(2, config.release.channels, *size, generator=torch.Generator().manual_seed(3)) / 4
    expected = wan_vaes.reference_decode(module, config, latents)
    found = direct_jobs.decode(model, latents)
    pixels = config.release.pixels
    assert found.shape == (2, 3, 4 * (frames - 1) + 1, pixels * height, pixels * width)
    assert (found.clamp(-1, 1) - expected).abs().max() <= 1e-6
    video = expected * 0.7
    encoded = direct_jobs.encode(model, video)
    assert encoded.shape == latents.shape
    right = wan_vaes.reference_encode(module, config, video)
    assert (encoded - right).abs().max() <= 1e-6 * right.abs().max()


def test_videos_that_cannot_be_run_are_refused(model: CachedModel, config: WanVaeConfig) -> None:
    import direct_jobs

    channels, pixels = config.release.channels, config.release.pixels
    takes = rf"\[batch, {channels}, \(frames - 1\) / 4 \+ 1, height / {pixels}, width / {pixels}\]"
    with pytest.raises(BadRequest, match=f"or of videos {takes}"):
        direct_jobs.decode(model, torch.zeros(1, channels, 2, 1, 4, 6))
    with pytest.raises(BadRequest, match="frames: 4 is not 1 more than a multiple of 4"):
        direct_jobs.encode(model, torch.zeros(1, 3, 4, 32, 48))
