"""The VAE of Qwen-Image and Wan 2.1: key maps of both namings, decode and encode beside diffusers, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from xditd.gpu_workers.families.wan_vae.checkpoint import WanVae
from xditd.gpu_workers.families.wan_vae.config import DEVIATIONS, MEANS, WanVaeConfig
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, check_targets, resolve
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
SMALL = WanVaeConfig(width=8)
FULL = WanVaeConfig(width=96)
ORIGINAL = ("decoder.middle.0.residual.0.gamma",)
NAMINGS = [ORIGINAL, ()]
IDS = ["original", "diffusers"]


def state_dict(names: tuple[str, ...], config: WanVaeConfig = SMALL) -> State:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for entry in WanVae().entries(config, names):
        values = torch.randn(entry.shape, generator=generator)
        if not entry.source.endswith(".weight"):
            values = 1.0 + 0.1 * values if entry.source.endswith("gamma") else 0.1 * values
        else:
            values = values / torch.Size(entry.shape[1:]).numel() ** 0.5
        state[entry.source] = values
    return state


def reference(state: State, config: WanVaeConfig = SMALL, *, class_name: str = "AutoencoderKLQwenImage") -> Any:
    import diffusers
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    is_original = any(name in state for name in ORIGINAL)
    module = getattr(diffusers, class_name)(base_dim=config.width)
    module.load_state_dict(convert_wan_vae_to_diffusers(dict(state)) if is_original else state)
    return module.eval().requires_grad_(False)


def infos(state: State) -> dict[str, TensorInfo]:
    return {name: TensorInfo.of(tensor) for name, tensor in state.items()}


def fitted(given: dict[str, TensorInfo]) -> Resolution:
    return resolve(detect(given.keys()), given)


@pytest.fixture(params=NAMINGS, ids=IDS)
def state(request: pytest.FixtureRequest) -> State:
    return state_dict(request.param)


@pytest.fixture
def model(shared_cache: ModelCache, state: State, plug: Plugger) -> CachedModel:
    return plug(shared_cache, state).model


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_every_element_is_that_of_diffusers(state: State, prefix: str) -> None:
    given = {prefix + name: tensor for name, tensor in state.items()}
    found = fitted(infos(given))
    assert (found.family.name, found.config) == ("wan_vae", SMALL)
    expected = reference(state).state_dict()
    assert found.key_map.keys() == expected.keys()
    for target, part in found.key_map.items():
        ours = given[part.source][part.start : part.stop]
        assert torch.equal(ours.view(part.shape or ours.shape), expected[target]), target


@pytest.mark.parametrize("names", NAMINGS, ids=IDS)
def test_the_full_size_is_the_class_s(names: tuple[str, ...]) -> None:
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        module = AutoencoderKLQwenImage()
    entries = list(WanVae().entries(FULL, names))
    check_targets(WanVae(), iter(entries), {name: tuple(each.shape) for name, each in module.named_parameters()})
    assert (tuple(module.config.latents_mean), tuple(module.config.latents_std)) == (MEANS, DEVIATIONS)
    given = {entry.source: TensorInfo("bfloat16", entry.shape) for entry in entries}
    assert fitted(given).config == FULL


@pytest.mark.parametrize("class_name", ["AutoencoderKLQwenImage", "AutoencoderKLWan"])
@pytest.mark.parametrize("shape", [(1, 16, 4, 6), (2, 16, 5, 3)])
def test_decoding_gives_the_bits_of_the_pipeline(
    model: CachedModel, state: State, shape: tuple[int, ...], class_name: str
) -> None:
    import direct_jobs

    vae = reference(state, class_name=class_name)
    latents = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    means, deviations = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (MEANS, DEVIATIONS))
    with torch.no_grad():
        expected = vae.decode(latents.unsqueeze(2) / (1.0 / deviations) + means, return_dict=False)[0][:, :, 0]
    found = direct_jobs.decode(model, latents)
    assert found.shape == (shape[0], 3, shape[2] * 8, shape[3] * 8)
    assert found.abs().max() > 1  # what the class clamps
    assert torch.equal(found.clamp(-1, 1), expected)


@pytest.mark.parametrize("size", [(32, 48), (40, 24)])
def test_encoding_gives_the_bits_of_the_pipeline(model: CachedModel, state: State, size: tuple[int, int]) -> None:
    import direct_jobs

    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    means, deviations = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (MEANS, DEVIATIONS))
    with torch.no_grad():
        mode = reference(state).encode(image.unsqueeze(2)).latent_dist.mode()
    assert torch.equal(direct_jobs.encode(model, image), ((mode - means) / deviations)[:, :, 0])


def test_a_decoder_alone_decodes_and_does_not_encode(shared_cache: ModelCache, plug: Plugger) -> None:
    import direct_jobs

    whole = state_dict(ORIGINAL)
    decoder = {name: each for name, each in whole.items() if not name.startswith(("encoder.", "conv1."))}
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = direct_jobs.decode(plug(shared_cache, whole).model, latents)
    model = plug(shared_cache, decoder).model
    assert model.config == replace(SMALL, has_encoder=False)
    assert torch.equal(direct_jobs.decode(model, latents), expected)
    with pytest.raises(Unsupported, match="lent without its encoder tensors"):
        direct_jobs.encode(model, torch.zeros(1, 3, 32, 32))


def test_wrong_shapes_are_refused(model: CachedModel) -> None:
    import direct_jobs

    with pytest.raises(BadRequest, match=r"latents are \[1, 4, 4, 4\]: use \[batch, 16, height / 8, width / 8\]"):
        direct_jobs.decode(model, torch.zeros(1, 4, 4, 4))
    with pytest.raises(BadRequest, match=r"image is \[1, 4, 32, 32\]: use \[batch, 3, height, width\]"):
        direct_jobs.encode(model, torch.zeros(1, 4, 32, 32))
    with pytest.raises(BadRequest, match="height 20: use a multiple of 8"):
        direct_jobs.encode(model, torch.zeros(1, 3, 20, 32))


def test_faults_and_relatives_are_named(state: State) -> None:
    given = infos(state)
    name = "conv2.weight" if "conv2.weight" in given else "post_quant_conv.weight"
    with pytest.raises(BadCheckpoint, match=f"1 missing: {name}"):
        fitted({other: info for other, info in given.items() if other != name})
    with pytest.raises(Unsupported, match=r"Wan 2\.2's VAE of 48 channels"):
        fitted({**given, "decoder.upsamples.0.upsamples.0.residual.2.weight": TensorInfo("bfloat16", (8, 8))})
    last = "decoder.head.2" if "decoder.head.2.bias" in given else "decoder.conv_out"
    of_four = {f"{last}.weight": TensorInfo("float32", (4, 8, 3, 3, 3)), f"{last}.bias": TensorInfo("float32", (4,))}
    with pytest.raises(Unsupported, match=r"images of 4 channels, not 3 \(Qwen-Image-Layered's have transparency\)"):
        fitted({**given, **of_four})


@pytest.mark.parametrize("size", [(1, 4, 6), (2, 3, 5), (4, 2, 3)])
def test_a_video_is_decoded_and_encoded_as_wan_s_class_does(model: CachedModel, state: State, size: Any) -> None:
    import direct_jobs

    module = reference(state, class_name="AutoencoderKLWan")
    latents = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(3)) / 4
    means, deviations = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (MEANS, DEVIATIONS))
    with torch.no_grad():
        expected = module.decode(latents / (1.0 / deviations) + means, return_dict=False)[0]
    found = direct_jobs.decode(model, latents)
    frames, height, width = size
    assert found.shape == (2, 3, 4 * (frames - 1) + 1, 8 * height, 8 * width)
    assert (found.clamp(-1, 1) - expected).abs().max() <= 1e-6
    video = expected * 0.7
    with torch.no_grad():
        z = module.encode(video).latent_dist.mode()
    encoded = direct_jobs.encode(model, video)
    assert encoded.shape == latents.shape
    right = (z - means) / deviations
    assert (encoded - right).abs().max() <= 1e-6 * right.abs().max()


def test_videos_that_cannot_be_run_are_refused(model: CachedModel) -> None:
    import direct_jobs

    with pytest.raises(BadRequest, match=r"or of videos \[batch, 16, \(frames - 1\) / 4 \+ 1, height / 8, width / 8\]"):
        direct_jobs.decode(model, torch.zeros(1, 16, 2, 1, 4, 6))
    with pytest.raises(BadRequest, match="frames: 4 is not 1 more than a multiple of 4"):
        direct_jobs.encode(model, torch.zeros(1, 3, 4, 32, 48))
