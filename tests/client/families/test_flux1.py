"""FLUX.1's tokens and positions against those of diffusers' pipeline."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")

from xditd.client.families.flux1 import image_positions, pack, text_positions, unpack  # noqa: E402

Pipeline = flux.FluxPipeline


@pytest.mark.parametrize(("rows", "height", "width"), [(1, 4, 4), (2, 6, 10)])
def test_tokens_and_positions_are_those_of_the_pipeline(rows, height, width):
    latents = torch.randn(rows, 16, height, width, generator=torch.Generator().manual_seed(1))
    packed = pack(latents)
    assert packed.is_contiguous()
    assert torch.equal(packed, Pipeline._pack_latents(latents, *latents.shape))
    assert torch.equal(unpack(packed, height, width), Pipeline._unpack_latents(packed, 8 * height, 8 * width, 8))
    assert torch.equal(unpack(packed, height, width), latents)
    found = image_positions(height // 2, width // 2)
    expected = Pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, torch.device("cpu"), torch.float32)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(text_positions(7), torch.zeros(7, 3))


def test_latents_that_are_not_contiguous_are_packed():
    latents = torch.randn(1, 6, 4, 16, generator=torch.Generator().manual_seed(1)).movedim(-1, 1)
    assert torch.equal(pack(latents), pack(latents.contiguous()))
