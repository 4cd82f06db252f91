"""A VAE on one rank against plain diffusers; every tensor matters; bad input is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.families.flux_vae.config import SCALING
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import LatentScaling

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]

BAR = 1e-6
MUTATION_BAR = 10 * BAR
NAN = float("nan")
# A constant added to all logits of a query: softmax ignores it, in every model with such a bias.
INVISIBLE = {"encoder.mid.attn_1.k.bias", "decoder.mid.attn_1.k.bias"}


@pytest.mark.parametrize(("height", "width"), [(14, 10), (9, 7)])
def test_decode_and_encode_equal_plain_diffusers(
    height: int, width: int, vae: CachedModel, demo_vae: State, direct: ModuleType
) -> None:
    model = reference.vae_from(demo_vae)
    latents = torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(0))
    image = direct.decode(vae, latents).clamp(-1.0, 1.0)
    assert image.shape == (1, 3, 8 * height, 8 * width)
    assert reference.relative_error(image, reference.reference_decode(model, latents)) <= BAR
    encoded = direct.encode(vae, image)
    assert encoded.shape == latents.shape
    assert reference.relative_error(encoded, reference.reference_encode(model, image)) <= BAR
    assert (model.config.scaling_factor, model.config.shift_factor) == (SCALING.factor, SCALING.shift)
    odd = image[:, :, :104, :72]  # a VAE needs multiples of 8 pixels; of 16 only what a transformer makes
    assert reference.relative_error(direct.encode(vae, odd), reference.reference_encode(model, odd)) <= BAR


def test_latents_of_another_model_are_scaled_as_its_facts_say(
    vae: CachedModel, demo_vae: State, direct: ModuleType
) -> None:
    model = reference.vae_from(demo_vae)
    sd3 = LatentScaling(factor=1.5305, shift=0.0609)
    latents = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.decode(latents / 1.5305 + 0.0609, return_dict=False)[0]
        again = (model.encode(expected).latent_dist.mode() - 0.0609) * 1.5305
    assert reference.relative_error(direct.decode(vae, latents, scaling=sd3), expected) <= BAR
    assert reference.relative_error(direct.encode(vae, expected, scaling=sd3), again) <= BAR
    assert reference.relative_error(direct.decode(vae, latents), expected) > 1000 * BAR


def test_a_decoder_alone_decodes_and_refuses_to_encode(
    cache: ModelCache, vae: CachedModel, demo_vae: State, plug: Plugger, direct: ModuleType
) -> None:
    half = plug(cache, {name: tensor for name, tensor in demo_vae.items() if name.startswith("decoder.")}).model
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(direct.decode(half, latents), direct.decode(vae, latents))
    with pytest.raises(Unsupported, match="without its encoder"):
        direct.encode(half, torch.zeros(1, 3, 32, 32))


@pytest.mark.long
@pytest.mark.slow
def test_zeroing_any_tensor_of_the_vae_shows_in_image_or_latents(
    shared_cache: ModelCache, demo_vae: State, plug: Plugger, direct: ModuleType
) -> None:
    model = reference.vae_from(demo_vae)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 6, 6, generator=generator)
    image = torch.rand(1, 3, 48, 48, generator=generator) * 2 - 1
    decoded, encoded = reference.reference_decode(model, latents), reference.reference_encode(model, image)
    figures: dict[str, float] = {}
    for name, tensor in demo_vae.items():
        cached = plug(shared_cache, {**demo_vae, name: torch.zeros_like(tensor)}).model
        if name.startswith("decoder."):
            figures[name] = reference.relative_error(direct.decode(cached, latents).clamp(-1.0, 1.0), decoded)
        else:
            figures[name] = reference.relative_error(direct.encode(cached, image), encoded)
    assert {name for name, figure in figures.items() if figure < MUTATION_BAR} == INVISIBLE
    # What no figure can show, the parameters do.
    module = plug(shared_cache, demo_vae).model.module
    for side in ("encoder", "decoder"):
        bias = module.get_parameter(f"{side}.mid_block.attentions.0.to_k.bias")
        assert torch.equal(bias, demo_vae[f"{side}.mid.attn_1.k.bias"])


def test_bad_images_and_latents_name_the_value(vae: CachedModel, direct: ModuleType) -> None:
    for latents in (
        torch.zeros(1, 4, 8, 8),
        torch.zeros(16, 8, 8),
        torch.zeros(0, 16, 8, 8),
        torch.zeros(1, 16, 1, 1025),
        torch.zeros(65, 16, 1, 1),
    ):
        with pytest.raises(BadRequest, match="latents are"):
            direct.decode(vae, latents)
    with pytest.raises(BadRequest, match="latents: some values are not finite"):
        direct.decode(vae, torch.full((1, 16, 4, 4), NAN))
    with pytest.raises(BadRequest, match="image is"):
        direct.encode(vae, torch.zeros(1, 4, 32, 32))
    with pytest.raises(BadRequest, match="image is"):
        direct.encode(vae, torch.zeros(65, 3, 16, 16))
    with pytest.raises(BadRequest, match="width 44: use a multiple of 8 up to 8192 pixels"):
        direct.encode(vae, torch.zeros(1, 3, 32, 44))
    with pytest.raises(BadRequest, match="image: some values are not finite"):
        direct.encode(vae, torch.full((1, 3, 32, 32), NAN))


def test_an_image_is_not_cut_off_at_its_range(vae: CachedModel, direct: ModuleType) -> None:
    latents = 40 * torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert direct.decode(vae, latents).abs().max() > 1.0


def test_one_rank_shares_no_decode_with_itself(vae: CachedModel) -> None:
    operations: Any = vae.operations
    assert not operations.shares(vae, torch.zeros(1, 16, 128, 128))
    assert not operations.shares(vae, torch.zeros(16, 128, 128))  # which decode() refuses by its shape


def test_what_clients_are_told(vae: CachedModel, cache: ModelCache, demo_vae: State, plug: Plugger) -> None:
    operations: Any = vae.operations
    facts = operations.facts(vae.config)
    assert (facts.latents.channels, facts.latents.pixels, facts.latents.multiple) == (16, 8, 1)
    assert (facts.latents.scaling, facts.image_channels, facts.has_encoder) == (SCALING, 3, True)
    half = {name: tensor for name, tensor in demo_vae.items() if name.startswith("decoder.")}
    assert not operations.facts(plug(cache, half).model.config).has_encoder
