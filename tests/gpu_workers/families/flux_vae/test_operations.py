"""A VAE on one rank against plain diffusers; every tensor matters; bad input is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.families.flux_vae.checkpoint import SCALING, SHIFT
from xditd.gpu_workers.models.skeletons import Plan, Skeleton, SkeletonCache
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[SkeletonCache, State], Plan]

BAR = 1e-6
MUTATION_BAR = 10 * BAR
NAN = float("nan")
# A constant added to all logits of a query: softmax ignores it, in every model with such a bias.
INVISIBLE = {"encoder.mid.attn_1.k.bias", "decoder.mid.attn_1.k.bias"}


@pytest.fixture(scope="module")
def image_coding(layout: ParallelLayout) -> ModuleType:
    from xditd.gpu_workers.families.flux_vae import image_coding

    return image_coding


@pytest.mark.parametrize(("height", "width"), [(14, 10), (9, 7)])
def test_decode_and_encode_equal_plain_diffusers(
    height: int, width: int, vae: Skeleton, demo_vae: State, image_coding: ModuleType
) -> None:
    model = reference.vae_from(demo_vae)
    latents = torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(0))
    image = image_coding.decode(vae, latents)
    assert image.shape == (1, 3, 8 * height, 8 * width)
    assert image.abs().max() <= 1.0
    assert reference.relative_error(image, reference.reference_decode(model, latents)) <= BAR
    encoded = image_coding.encode(vae, image)
    assert encoded.shape == latents.shape
    assert reference.relative_error(encoded, reference.reference_encode(model, image)) <= BAR
    assert (model.config.scaling_factor, model.config.shift_factor) == (SCALING, SHIFT)
    odd = image[:, :, :104, :72]  # a VAE needs multiples of 8 pixels; of 16 only what a transformer makes
    assert reference.relative_error(image_coding.encode(vae, odd), reference.reference_encode(model, odd)) <= BAR


def test_a_decoder_alone_decodes_and_refuses_to_encode(
    cache: SkeletonCache, vae: Skeleton, demo_vae: State, plug: Plugger, image_coding: ModuleType
) -> None:
    half = plug(cache, {name: tensor for name, tensor in demo_vae.items() if name.startswith("decoder.")}).skeleton
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(image_coding.decode(half, latents), image_coding.decode(vae, latents))
    with pytest.raises(Unsupported, match="without its encoder"):
        image_coding.encode(half, torch.zeros(1, 3, 32, 32))


@pytest.mark.slow
def test_zeroing_any_tensor_of_the_vae_shows_in_image_or_latents(
    shared_cache: SkeletonCache, demo_vae: State, plug: Plugger, image_coding: ModuleType
) -> None:
    model = reference.vae_from(demo_vae)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 6, 6, generator=generator)
    image = torch.rand(1, 3, 48, 48, generator=generator) * 2 - 1
    decoded, encoded = reference.reference_decode(model, latents), reference.reference_encode(model, image)
    figures: dict[str, float] = {}
    for name, tensor in demo_vae.items():
        skeleton = plug(shared_cache, {**demo_vae, name: torch.zeros_like(tensor)}).skeleton
        if name.startswith("decoder."):
            figures[name] = reference.relative_error(image_coding.decode(skeleton, latents), decoded)
        else:
            figures[name] = reference.relative_error(image_coding.encode(skeleton, image), encoded)
    assert {name for name, figure in figures.items() if figure < MUTATION_BAR} == INVISIBLE
    # What no figure can show, the parameters do.
    module = plug(shared_cache, demo_vae).skeleton.module
    for side in ("encoder", "decoder"):
        bias = module.get_parameter(f"{side}.mid_block.attentions.0.to_k.bias")
        assert torch.equal(bias, demo_vae[f"{side}.mid.attn_1.k.bias"])


def test_bad_images_and_latents_name_the_value(vae: Skeleton, image_coding: ModuleType) -> None:
    for latents in (
        torch.zeros(1, 4, 8, 8),
        torch.zeros(16, 8, 8),
        torch.zeros(0, 16, 8, 8),
        torch.zeros(1, 16, 1, 1025),
        torch.zeros(65, 16, 1, 1),
    ):
        with pytest.raises(BadRequest, match="latents are"):
            image_coding.decode(vae, latents)
    with pytest.raises(BadRequest, match="latents: some values are not finite"):
        image_coding.decode(vae, torch.full((1, 16, 4, 4), NAN))
    with pytest.raises(BadRequest, match="image is"):
        image_coding.encode(vae, torch.zeros(1, 4, 32, 32))
    with pytest.raises(BadRequest, match="image is"):
        image_coding.encode(vae, torch.zeros(65, 3, 16, 16))
    with pytest.raises(BadRequest, match="width 44: use a multiple of 8 up to 8192 pixels"):
        image_coding.encode(vae, torch.zeros(1, 3, 32, 44))
    with pytest.raises(BadRequest, match="image: some values are not finite"):
        image_coding.encode(vae, torch.full((1, 3, 32, 32), NAN))


def test_a_component_of_the_wrong_kind_is_refused(transformer: Skeleton, image_coding: ModuleType) -> None:
    with pytest.raises(BadRequest, match="needs a VAE, but the component is a transformer"):
        image_coding.decode(transformer, torch.zeros(1, 16, 4, 4))
