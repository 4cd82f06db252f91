"""The demo's calls of FLUX.1 against what diffusers' pipeline makes of the same latents."""

import pytest

torch = pytest.importorskip("torch")
flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")

from xditd.client.demo.flux1_calls import image_ids, pack, text_ids, unpack  # noqa: E402

Pipeline = flux.FluxPipeline


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 4, 4), (2, 6, 10)])
def test_latents_and_ids_are_those_of_the_pipeline(batch, height, width):
    latents = torch.randn(batch, 16, height, width)
    packed = pack(latents)
    assert torch.equal(packed, Pipeline._pack_latents(latents, *latents.shape))
    assert torch.equal(unpack(packed, height, width), Pipeline._unpack_latents(packed, 8 * height, 8 * width, 8))
    ids = Pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(height, width).tensor, ids)
    assert image_ids(height, width) is image_ids(height, width)  # kept once
    assert torch.equal(text_ids(7).tensor, torch.zeros(7, 3))
