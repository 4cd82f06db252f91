"""FLUX.2's VAE: key maps element by element, decode and encode against diffusers' pipeline, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import flux2_vaes
import pytest
import torch

from xditd.gpu_workers.families.flux2_vae.checkpoint import Flux2Vae
from xditd.gpu_workers.families.flux2_vae.config import Flux2VaeConfig
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, resolve
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported
from xditd.ipc.facts import LatentScaling

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
SMALL, NARROW = flux2_vaes.SMALL, flux2_vaes.NARROW
FULL = Flux2VaeConfig((128, 256, 512, 512), (128, 256, 512, 512), residuals=2, has_quant_conv=True)
NAMINGS = ("comfyui", "original", "diffusers")
BAR = 1e-6


def infos(state: State) -> dict[str, TensorInfo]:
    return {name: TensorInfo.of(tensor) for name, tensor in state.items()}


def fitted(state: State) -> Resolution:
    return resolve(detect(state, "vae"), infos(state))


def error_of(ours: torch.Tensor, right: torch.Tensor) -> float:
    return float((ours.double() - right.double()).abs().max() / right.double().abs().max())


@pytest.fixture
def vae(shared_cache: ModelCache, plug: Plugger) -> CachedModel:
    return plug(shared_cache, flux2_vaes.state_dict(0)).model


@pytest.mark.parametrize("config", [SMALL, NARROW], ids=["alike", "narrow decoder"])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_each_naming_is_one_configuration(config: Flux2VaeConfig, naming: Any, prefix: str) -> None:
    found = fitted(flux2_vaes.state_dict(0, config, naming=naming, prefix=prefix))
    assert found.family.name == "flux2_vae"
    assert found.config == replace(config, has_linear_attention=naming == "diffusers")
    assert found.skipped == (f"{prefix}bn.num_batches_tracked",)


def test_full_size_is_diffusers_own() -> None:
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        module = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
        )
    given = {name: TensorInfo.of(tensor) for name, tensor in module.state_dict().items()}
    found = resolve(detect(given, "vae"), given)
    assert found.config == replace(FULL, has_linear_attention=True)
    assert found.key_map.keys() | {"bn.num_batches_tracked"} == given.keys()


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_element_is_in_its_place(naming: Any) -> None:
    """What diffusers' converter makes of ldm's names, and diffusers' own for the rest."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = flux2_vaes.state_dict(3, NARROW, naming=naming)
    config = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    expected = dict(state)
    if naming != "diffusers":
        bare = {name.replace("encoder.quant", "quant").replace("decoder.post", "post"): t for name, t in state.items()}
        expected = convert_ldm_vae_checkpoint(dict(bare), config)
        expected |= {name: tensor for name, tensor in bare.items() if name.startswith("bn.")}
    expected.pop("bn.num_batches_tracked")
    found = fitted(state)
    assert expected.keys() == found.key_map.keys()
    for target, part in found.key_map.items():
        ours = state[part.source][part.start : part.stop]
        assert torch.equal(ours if part.shape is None else ours.view(part.shape), expected[target]), target


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(("rows", "height", "width"), [(1, 4, 6), (2, 3, 5)])
def test_decode_and_encode_equal_the_pipeline(
    shared_cache: ModelCache, plug: Plugger, direct: ModuleType, naming: Any, rows: int, height: int, width: int
) -> None:
    model = plug(shared_cache, flux2_vaes.state_dict(0, naming=naming)).model
    reference = flux2_vaes.reference()
    latents = torch.randn(rows, 128, height, width, generator=torch.Generator().manual_seed(0))
    image = direct.decode(model, latents)
    assert image.shape == (rows, 3, 16 * height, 16 * width)
    assert error_of(image, flux2_vaes.reference_decode(reference, latents)) <= BAR
    encoded = direct.encode(model, image.clamp(-1, 1))
    assert encoded.shape == latents.shape
    assert error_of(encoded, flux2_vaes.reference_encode(reference, image.clamp(-1, 1))) <= BAR


def test_a_scaling_of_the_caller_is_applied(vae: CachedModel, direct: ModuleType) -> None:
    latents = torch.randn(1, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    scaling = LatentScaling(factor=2.0, shift=0.5)
    image = direct.decode(vae, latents)
    assert error_of(direct.decode(vae, (latents - 0.5) * 2, scaling=scaling), image) <= 1e-5
    assert error_of(direct.encode(vae, image, scaling=scaling), (direct.encode(vae, image) - 0.5) * 2) <= BAR


def test_statistics_matter(shared_cache: ModelCache, plug: Plugger, vae: CachedModel, direct: ModuleType) -> None:
    latents = torch.randn(1, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    image = direct.decode(vae, latents)
    state = flux2_vaes.state_dict(0)
    for name in ("bn.running_mean", "bn.running_var", "post_quant_conv.bias"):
        changed = plug(shared_cache, {**state, name: state[name] + 0.5}).model
        assert error_of(direct.decode(changed, latents), image) > 1e-3, name


def test_float32_statistics_beside_bfloat16_weights(cache: ModelCache, plug: Plugger, direct: ModuleType) -> None:
    state = {
        name: tensor if name.startswith("bn.") else tensor.to(torch.bfloat16)
        for name, tensor in flux2_vaes.state_dict(0).items()
    }
    model = plug(cache, state).model
    assert model.dtype == torch.bfloat16
    latents = torch.randn(1, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    exact = flux2_vaes.reference_decode(flux2_vaes.reference(), latents)
    assert error_of(direct.decode(model, latents).float(), exact) <= 0.1


def test_a_decoder_alone_decodes_and_refuses_to_encode(
    cache: ModelCache, plug: Plugger, vae: CachedModel, direct: ModuleType
) -> None:
    state = {
        name: each for name, each in flux2_vaes.state_dict(0).items() if not name.startswith(("encoder.", "quant"))
    }
    half = plug(cache, state).model
    latents = torch.randn(1, 128, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(direct.decode(half, latents), direct.decode(vae, latents))
    with pytest.raises(Unsupported, match="without its encoder"):
        direct.encode(half, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decoder.conv_in.weight": (128, 16, 3, 3)}, "decoder.conv_in.weight has 16 channels, not 32"),
        ({"bn.running_mean": (64,)}, "bn.running_mean has 64 channels, not 128"),
    ],
)
def test_relatives_are_refused_by_name(changes: dict[str, tuple[int, ...]], says: str) -> None:
    state = flux2_vaes.state_dict(0) | {name: torch.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(Unsupported, match=says) as caught:
        fitted(state)
    assert "lend flux2-vae.safetensors" in caught.value.detail


@pytest.mark.parametrize("naming", NAMINGS)
def test_faults_are_named_as_the_file_spells_them(naming: Any) -> None:
    state = flux2_vaes.state_dict(0, naming=naming)
    missing = "decoder.up_blocks.0.resnets.1.conv2.bias" if naming == "diffusers" else "decoder.up.3.block.1.conv2.bias"
    del state[missing], state["bn.running_var"]
    state["decoder.extra"] = torch.zeros(1)
    with pytest.raises(BadCheckpoint) as caught:
        fitted(state)
    assert set(caught.value.names) >= {"missing: bn.running_var", "unexpected: decoder.extra"}
    assert f"missing: {missing}" in caught.value.names or "decoder.up.3.block.1.conv2.bias" in caught.value.detail


def test_the_vae_of_flux1_is_another_family(demo_vae: State) -> None:
    assert detect(demo_vae, "vae").name == "flux_vae"
    assert not Flux2Vae().claims(demo_vae)


def test_bad_images_and_latents_name_the_value(vae: CachedModel, direct: ModuleType) -> None:
    for latents in (
        torch.zeros(1, 32, 8, 8),
        torch.zeros(128, 8, 8),
        torch.zeros(0, 128, 8, 8),
        torch.zeros(65, 128, 1, 1),
    ):
        with pytest.raises(BadRequest, match="latents are"):
            direct.decode(vae, latents)
    with pytest.raises(BadRequest, match="latents: some values are not finite"):
        direct.decode(vae, torch.full((1, 128, 2, 2), float("nan")))
    with pytest.raises(BadRequest, match="image is"):
        direct.encode(vae, torch.zeros(1, 4, 32, 32))
    with pytest.raises(BadRequest, match="width 40: use a multiple of 16 up to 8192 pixels"):
        direct.encode(vae, torch.zeros(1, 3, 32, 40))


def test_what_clients_are_told(vae: CachedModel) -> None:
    operations: Any = vae.operations
    facts = operations.facts(vae.config)
    assert (facts.latents.channels, facts.latents.pixels, facts.latents.multiple) == (128, 16, 1)
    assert (facts.latents.scaling, facts.image_channels, facts.has_encoder) == (
        LatentScaling(factor=1, shift=0),
        3,
        True,
    )
    assert not operations.shares(vae, torch.zeros(1, 128, 64, 64))
