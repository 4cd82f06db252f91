"""FLUX.1 Kontext, Fill, Canny and Depth in a real ComfyUI: the latents of stock, by its own nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xditd.client.demo import checkpoints
from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 2e-6


def latents(seed: int, rows: int = 8, columns: int = 8, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, rows, columns, generator=torch.Generator().manual_seed(seed))


def referring(conditioning: list[Any], references: list[torch.Tensor], method: str | None = None) -> list[Any]:
    from comfy_extras.nodes_edit_model import ReferenceLatent
    from comfy_extras.nodes_flux import FluxKontextMultiReferenceLatentMethod

    for each in references:
        conditioning = ReferenceLatent.execute(conditioning, {"samples": each}).result[0]
    if method is not None:
        conditioning = FluxKontextMultiReferenceLatentMethod.execute(conditioning, method).result[0]
    return conditioning


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ([(8, 8)], {}),
        ([(8, 12), (6, 10)], {"cfg": 3.0}),
        ([(12, 8), (8, 8)], {"sampler_name": "dpmpp_2m", "scheduler": "beta"}),
        ([(9, 7)], {"batch": 2}),
        ([(8, 12), (6, 10)], {"method": "index"}),
        ([(8, 12), (6, 10)], {"method": "uxo/uno"}),
        ([(7, 9), (9, 7)], {"pixels": 56}),
    ],
    ids=str,
)
def test_references_of_kontext(
    sizes, options, remote: Any, local: Any, conditioning, ksample, relative_error: Callable[..., float]
) -> None:
    options = dict(options)
    method, batch, side = options.pop("method", None), options.pop("batch", 1), options.pop("pixels", 64) // 8
    given = [latents(number, *size) for number, size in enumerate(sizes)]
    positive, negative = referring(conditioning(1), given, method), conditioning(2)
    latent = {"samples": torch.zeros(batch, 16, side, side)}
    expected = ksample(local, positive, negative, dict(latent), **options)
    assert relative_error(ksample(remote, positive, negative, dict(latent), **options), expected) <= TOLERANCE
    plain = ksample(local, conditioning(1), negative, dict(latent), **options)
    assert relative_error(plain, expected) > 10 * TOLERANCE


def test_references_that_are_modulated_apart_are_refused(remote, conditioning, ksample) -> None:
    positive = referring(conditioning(1), [latents(1)], "index_timestep_zero")
    with pytest.raises(Unsupported, match="reference latents by the method 'index_timestep_zero'"):
        ksample(remote, positive, conditioning(2), {"samples": torch.zeros(1, 16, 8, 8)})


@pytest.mark.parametrize("through", ["loader", "accelerate"])
@pytest.mark.parametrize(("channels", "options"), [(32, {}), (96, {}), (96, {"cfg": 3.0, "mask": False})], ids=str)
def test_channels_beside_the_latents(
    channels, options, through, comfy, connected, conditioning, ksample, relative_error, tmp_path
) -> None:
    from node_helpers import conditioning_set_values

    from xditd.client.comfyui.accelerate import accelerate
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    tensors = checkpoints.flux1_state_dict(1)
    tensors["img_in.weight"] = torch.randn(256, 4 * channels, generator=torch.Generator().manual_seed(1)) / 20
    path = str(tmp_path / "variant.safetensors")
    save_file(tensors, path)
    local = comfy.comfy.sd.load_diffusion_model(path)
    remote = load_unet(path) if through == "loader" else accelerate(comfy.comfy.sd.load_diffusion_model(path))
    options = dict(options)
    values: dict[str, Any] = {"concat_latent_image": latents(3)}
    if options.pop("mask", channels == 96):
        values["concat_mask"] = (torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(4)) > 0.5).float()[None]
    positive, negative = (conditioning_set_values(conditioning(seed), values) for seed in (1, 2))
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    expected = ksample(local, positive, negative, dict(latent), **options)
    assert relative_error(ksample(remote, positive, negative, dict(latent), **options), expected) <= TOLERANCE
    other = {**values, "concat_latent_image": latents(5)}
    changed = conditioning_set_values(conditioning(1), other)
    assert relative_error(ksample(local, changed, negative, dict(latent), **options), expected) > 10 * TOLERANCE
