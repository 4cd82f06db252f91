"""Load VAE (xDiT) of Qwen-Image, Wan 2.1 and Wan 2.2 TI2V: the images, videos and latents of stock."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import wan_vaes
from comfyui_families import VARIANTS, drawn
from safetensors.torch import save_file

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

BAR = 1e-5
CHANNELS = {"wan 2.1": 16, "wan 2.2": 48}
PIXELS = {"wan 2.1": 8, "wan 2.2": 16}


@pytest.fixture(scope="module")
def vae_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vaes")
    made = {name: folder / f"{name.replace(' ', '_')}.safetensors" for name in wan_vaes.CONFIGS}
    for name, config in wan_vaes.CONFIGS.items():
        save_file(wan_vaes.state_dict(config=config), made[name])
    return made


@pytest.fixture(scope="module", autouse=True)
def _small(comfy) -> Iterator[None]:
    """ComfyUI builds the VAE of Wan 2.2 in its real widths, whatever a file has."""
    from comfy.ldm.wan import vae2_2

    config = wan_vaes.SMALL_2_2
    made = functools.partial(vae2_2.WanVAE, dec_dim=config.width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae2_2, "WanVAE", lambda **sizes: made(**{**sizes, "dim": config.encoder_width}))
        yield


@pytest.fixture
def pair(comfy, connected, vae_files):
    """The VAE as the stock loader holds it, and ours."""
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    def load(name: str):
        path = str(vae_files[name])
        return comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(path)), load_vae(path)

    return load


@torch.inference_mode()
@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("size", [(1, 9, 7), (3, 4, 5), (2, 6, 4)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_images_and_videos_are_decoded(batch, size, name, pair, relative_error):
    stock, ours = pair(name)
    z = drawn(batch, CHANNELS[name], *size)
    expected, found = stock.decode(z), ours.decode(z)
    assert found.shape == expected.shape
    assert found.shape[1] == 1 + 4 * (size[0] - 1)
    assert relative_error(found, expected) <= BAR


@torch.inference_mode()
@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("frames", [1, 5, 8])
def test_images_and_videos_are_encoded(frames, name, pair, relative_error):
    """Eight frames are five, as in stock; sides that are no multiples of a latent's pixels are cropped."""
    stock, ours = pair(name)
    pixels = torch.rand(frames, 75, 91, 3, generator=torch.Generator().manual_seed(2))
    expected, found = stock.encode(pixels), ours.encode(pixels)
    assert (
        found.shape
        == expected.shape
        == (1, CHANNELS[name], 1 + (frames - 1) // 4, 75 // PIXELS[name], 91 // PIXELS[name])
    )
    assert relative_error(found, expected) <= BAR


@torch.inference_mode()
def test_tiles_in_space_and_time(pair, relative_error):
    stock, ours = pair("wan 2.1")
    z = drawn(1, 16, 6, 12, 12)
    given = dict(tile_x=8, tile_y=8, overlap=2, tile_t=4, overlap_t=1)
    assert relative_error(ours.decode_tiled(z, **given), stock.decode_tiled(z, **given)) <= BAR


@torch.inference_mode()
@pytest.mark.parametrize(
    ("vae", "variant"),
    [
        ("wan 2.1", "wan22_image"), ("wan 2.1", "wan21_image"), ("wan 2.2", "wan22_ti2v"),
        ("wan 2.1", "wan21_two_images"), ("wan 2.1", "wan_vace"),
    ],
)  # fmt: skip
def test_a_video_from_images(vae, variant, pair, weightless, stock, ksample, relative_error):
    """The nodes of ComfyUI's own workflows: an image is encoded, a video is sampled and decoded."""
    from comfy_extras import nodes_wan

    made, videos = VARIANTS[variant], []
    for model, loaded in zip((weightless, stock), reversed(pair(vae)), strict=True):
        image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(2))
        positive, negative = (
            [[embeds, {name: each for name, each in more.items() if not name.startswith("vace_")}]]
            for ((embeds, more),) in (made.text(1), made.text(2))
        )
        if variant == "wan22_ti2v":
            (latent,) = nodes_wan.Wan22ImageToVideoLatent.execute(loaded, 96, 64, 5, 1, image).result
        elif variant == "wan_vace":
            given = positive, negative, loaded, 96, 64, 5, 1, 0.5, image.expand(5, -1, -1, -1), None, image.flip(1)
            positive, negative, latent, _ = nodes_wan.WanVaceToVideo.execute(*given).result
        elif variant == "wan21_two_images":
            given = positive, negative, loaded, 96, 64, 5, 1, image, image.flip(1)
            positive, negative, latent = nodes_wan.WanFirstLastFrameToVideo.execute(*given).result
        else:
            seen = positive[0][1].get("clip_vision_output")
            positive, negative, latent = nodes_wan.WanImageToVideo.execute(
                positive, negative, loaded, 96, 64, 5, 1, image, seen
            ).result
        samples = ksample(model(variant), positive, negative, latent)
        videos.append(loaded.decode(samples))
    assert videos[0].shape == (1, 9 if variant == "wan_vace" else 5, 64, 96, 3)
    assert relative_error(*videos) <= BAR
