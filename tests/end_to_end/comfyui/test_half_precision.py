"""In half precision the workers round where ComfyUI does: compared with stock in the file's dtype."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import z_image_models
from comfyui_families import PREFIX, VARIANTS, Z_IMAGE
from safetensors.torch import save_file

from xditd.client.demo import checkpoints
from xditd.ipc.errors import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

BAR = 5e-3
"""After 4 steps. Other kernels round differently; with diffusers' rounding of the timestep the error is 7e-2."""


NORM_BARS = {torch.bfloat16: 7e-3, torch.float16: 8e-4}
"""By norm, after 4 steps of tiny models; found: up to 4.6e-3 and 5.1e-4. Stock is as far from itself in float32. Wan in
bfloat16 is 3.4e-3 from float16, and FLUX.1 in float16 is 0.27 from bfloat16, which rounds its guidance."""


@pytest.fixture(scope="module")
def half_file(tmp_path_factory) -> Any:
    path = tmp_path_factory.mktemp("half") / "flux1-bf16.safetensors"
    checkpoints.write_flux1(path, seed=1, dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def stock(comfy, half_file) -> Any:
    model = comfy.comfy.sd.load_diffusion_model(str(half_file), model_options={"dtype": torch.bfloat16})
    model.model.manual_cast_dtype = None  # which ComfyUI sets on CPUs, where it computes in float32
    assert model.model.get_dtype_inference() is torch.bfloat16
    return model


@pytest.fixture
def half(connected, half_file) -> Any:
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return load_unet(str(half_file))


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("how", ["step by step", "fused", "accelerate"])
def test_bfloat16(how, guidance, stock, half, xsample, conditioning, ksample, latent, relative_error):
    from xditd.client.comfyui.accelerate import accelerate

    given = conditioning(1, guidance=guidance), conditioning(2)
    expected = ksample(stock, *given, dict(latent))
    if how == "fused":
        samples, _, note = xsample(half, positive=given[0], negative=given[1])
        assert note.startswith("fused")
    else:
        samples = ksample(half if how == "step by step" else accelerate(stock), *given, dict(latent))
    assert relative_error(samples, expected) <= BAR


def test_the_other_rounding_shows(stock, half, conditioning, ksample, latent, relative_error, monkeypatch):
    expected = ksample(stock, conditioning(1), conditioning(2), dict(latent))
    monkeypatch.setattr(type(half.family), "variant", "class")
    assert relative_error(ksample(half, conditioning(1), conditioning(2), dict(latent)), expected) > 3 * BAR


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name, comfy, connected, tmp_path, ksample):
    """In bfloat16, with a batch of an odd size and references where the family takes them."""
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    variant, path = VARIANTS[name], tmp_path / "file.safetensors"
    save_file({each: tensor.bfloat16() for each, tensor in variant.make(0).items()}, path)
    stock = comfy.comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.bfloat16})
    stock.model.manual_cast_dtype = None
    more = variant.references((6, 10)) if name in REFERENCES else {}
    given = *(variant.text(seed, size=variant.odd, **more) for seed in (1, 2)), variant.latent(2, variant.odd)
    ours, theirs = (ksample(model, *given) for model in (load_unet(str(path)), stock))
    assert (ours - theirs).norm() / theirs.norm() <= NORM_BARS[torch.bfloat16]


REFERENCES = ("flux1_dev", "flux2_dev", "flux2_klein", "qwen_image", "qwen_image_edit_2511")
"""Variants that take reference latents."""
FILES = {
    "wan_text": torch.bfloat16,  # in float16
    "wan_vace": torch.float32,
    "qwen_image": torch.float16,  # in bfloat16
    "flux1_fill": torch.float16,
    "flux1_dev": torch.float32,
    "z_image": torch.float32,
    "flux1_depth": torch.float8_e4m3fn,
}
"""Of each of these models the dtype of a file that ComfyUI holds in another one where it has a GPU."""


@pytest.fixture
def on_a_gpu(comfy, monkeypatch) -> None:
    """Let ComfyUI choose dtypes as where a GPU multiplies in both; it computes in the one that it holds."""
    from xditd.client.comfyui import stock_dtypes

    management = comfy.comfy.model_management
    for name in ("should_use_fp16", "should_use_bf16"):
        monkeypatch.setattr(management, name, lambda *_, **__: True)
    monkeypatch.setattr(stock_dtypes, "keeps_file_dtypes", lambda: False)


@pytest.mark.parametrize("name", FILES)
def test_files_of_another_dtype_are_held_as_stock_holds_them(
    name, connected, on_a_gpu, comfy, tmp_path, ksample, monkeypatch
):
    from xditd.client.comfyui import accelerate
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    variant = VARIANTS[name]
    path = tmp_path / "file.safetensors"
    is_packed = FILES[name] == torch.float8_e4m3fn  # of its matrices alone
    save_file(
        {
            each: tensor.to(FILES[name] if tensor.ndim == 2 or not is_packed else torch.bfloat16)
            for each, tensor in variant.make(0).items()
        },
        path,
    )
    monkeypatch.setattr(comfy.comfy.model_management, "supports_fp8_compute", lambda *_: True)
    stock = comfy.comfy.sd.load_diffusion_model(str(path))
    computes = stock.model.get_dtype_inference()
    assert computes != FILES[name]
    monkeypatch.setattr(accelerate, "keeps_file_dtypes", lambda: False)
    given = variant.text(1), variant.text(2), variant.latent()
    expected = ksample(stock, *given)
    for model in (load_unet(str(path)), accelerate.accelerate(stock)):
        held = {each.dtype for each in model.weights.base.values()}
        assert held == {FILES[name]} if is_packed else held <= {computes, torch.float32}
        apart = (ksample(model, *given) - expected).norm() / expected.norm()
        assert apart <= NORM_BARS[computes]


def test_what_is_beside_scaled_float8_has_the_dtype_of_products(
    connected, on_a_gpu, comfy, tmp_path, ksample, monkeypatch
):
    """Wan's, in float16; the file has it in bfloat16 and in float32."""
    from xditd.client.comfyui import accelerate
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    variant = VARIANTS["wan_text"]
    tensors = {}
    for name, tensor in variant.make(0).items():
        if ".self_attn.q.weight" in name:
            layer = name.removesuffix(".weight")
            tensors[name] = tensor.mul(64).to(torch.float8_e4m3fn)
            tensors[f"{layer}.weight_scale"] = torch.tensor(1 / 64)
            marker = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
            tensors[f"{layer}.comfy_quant"] = torch.tensor([*json.dumps(marker).encode()], dtype=torch.uint8)
        else:
            tensors[name] = tensor if tensor.ndim == 1 else tensor.to(torch.bfloat16)
    save_file(tensors, tmp_path / "file.safetensors")
    stock = comfy.comfy.sd.load_diffusion_model(str(tmp_path / "file.safetensors"))
    assert stock.model.get_dtype_inference() is torch.float16
    monkeypatch.setattr(accelerate, "keeps_file_dtypes", lambda: False)
    given = variant.text(1), variant.text(2), variant.latent()
    expected = ksample(stock, *given)
    for model in (load_unet(str(tmp_path / "file.safetensors")), accelerate.accelerate(stock)):
        apart = (ksample(model, *given) - expected).norm() / expected.norm()
        assert apart <= NORM_BARS[torch.float16]


def test_flags_for_the_dtype_are_obeyed_or_refused(connected, comfy, half_file, monkeypatch):
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    monkeypatch.setattr(comfy.comfy.cli_args.args, "fp16_unet", True)
    assert {each.dtype for each in load_unet(str(half_file)).weights.base.values()} == {torch.float16}
    monkeypatch.setattr(comfy.comfy.cli_args.args, "fp16_unet", False)
    monkeypatch.setattr(comfy.comfy.cli_args.args, "fp64_unet", True)
    with pytest.raises(Unsupported, match="flags ask for weights in float64"):
        load_unet(str(half_file))


def test_what_overflows_float16_is_clamped_as_stock_does(connected, on_a_gpu, comfy, tmp_path, ksample):
    """Z-Image Turbo, which ComfyUI knows by the values of a norm, runs in float16 from a file of it."""
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    variant, path = VARIANTS["z_image"], tmp_path / "file.safetensors"
    made = z_image_models.state_dict(0, config=replace(Z_IMAGE, layers=2), names=z_image_models.COMFYUI, prefix=PREFIX)
    tensors = {name: tensor.half() for name, tensor in made.items()}
    for name in tensors:
        if name.endswith("ffn_norm1.weight"):
            tensors[name] = torch.ones_like(tensors[name])
        if name.endswith(("feed_forward.w1.weight", "feed_forward.w3.weight")):
            tensors[name] *= 300
    save_file(tensors, path)
    stock = comfy.comfy.sd.load_diffusion_model(str(path))
    assert stock.model.get_dtype_inference() is torch.float16
    ours, given = load_unet(str(path)), (variant.text(1), variant.text(2), variant.latent())
    assert {each.dtype for each in ours.weights.base.values()} == {torch.float16}
    expected = ksample(stock, *given)
    assert expected.isfinite().all()
    apart = (ksample(ours, *given) - expected).norm() / expected.norm()
    assert apart <= 2 * NORM_BARS[torch.float16]
