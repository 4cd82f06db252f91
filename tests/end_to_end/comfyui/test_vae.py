"""Load VAE (xDiT) decodes, encodes and saves as a stock VAE does, and is refused if a node has changed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from xditd.client import Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-5


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(72, 64), (75, 91), (1080 // 15, 40)])
def test_sides_that_are_no_multiples_of_16_are_encoded_as_stock_does(
    height, width, comfy, connected, whole_file, relative_error
):
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    stock = comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(whole_file)))
    pixels = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(2))
    expected, actual = stock.encode(pixels), load_vae(str(whole_file)).encode(pixels)
    assert actual.shape == expected.shape == (1, 16, height // 8, width // 8)
    assert relative_error(actual, expected) <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 16, 9, 7), (66, 16, 2, 2), (1, 16, 1, 4, 4)])
def test_latents_of_any_size_and_number_are_decoded(shape, vae, stock_vae, relative_error):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert relative_error(vae.decode(z), stock_vae.decode(z)) <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("flag", [None, "bf16_vae"])
def test_a_vae_is_in_the_dtype_of_stock(flag, comfy, connected, decoder_file, tmp_path, relative_error, monkeypatch):
    """Whatever that of the file: in float32 on a CPU, or in that of a flag."""
    from xditd.client.comfyui.nodes.vae_loader import load_vae
    from xditd.client.comfyui.vae import weights_of

    path, sd = decoder_file, load_file(decoder_file)
    if flag is None:
        path, sd = tmp_path / "half.safetensors", {name: each.bfloat16() for name, each in sd.items()}
        save_file(sd, path)
    else:
        monkeypatch.setattr(comfy.comfy.cli_args.args, flag, True)
    stock, ours = comfy.comfy.sd.VAE(sd=sd), load_vae(str(path))
    assert ours.vae_dtype is stock.vae_dtype is (torch.float32 if flag is None else torch.bfloat16)
    for vae in (ours, stock):
        assert {each.dtype for each in weights_of(vae).base.values()} == {stock.vae_dtype}
    z = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    assert relative_error(ours.decode(z), stock.decode(z)) <= (TOLERANCE if flag is None else 2e-2)


@torch.inference_mode()
def test_latents_are_not_rounded_by_a_scaling(comfy, connected, whole_file, monkeypatch):
    """In bfloat16 a VAE decodes the numbers that stock's does, and what it encodes is not rounded again."""
    from xditd.client import Client
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    sent: list[tuple[torch.Tensor, Any]] = []
    decode, encode = Client.decode, Client.encode

    def noted(self: Any, vae: Any, latents: torch.Tensor, **more: Any) -> torch.Tensor:
        sent.append((latents, more["scaling"]))
        return decode(self, vae, latents, **more)

    def noted_encode(self: Any, vae: Any, pixels: torch.Tensor, **more: Any) -> torch.Tensor:
        sent.append((encode(self, vae, pixels, **more), more["scaling"]))
        return sent[-1][0]

    monkeypatch.setattr(comfy.comfy.cli_args.args, "bf16_vae", True)
    monkeypatch.setattr(Client, "decode", noted)
    monkeypatch.setattr(Client, "encode", noted_encode)
    ours = load_vae(str(whole_file))
    z = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    ours.decode(z)
    encoded = ours.encode(torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(2)))
    for (latents, scaling), expected in zip(sent, (z.bfloat16(), encoded), strict=True):
        half = latents.to(torch.bfloat16)
        assert torch.equal((half / scaling.factor + scaling.shift).float(), expected.float())


def test_vae_save_writes_the_tensors(vae, decoder_file, tmp_path):
    from comfy_extras.nodes_model_merging import VAESave

    node = VAESave()
    node.output_dir = str(tmp_path)
    node.save(vae, "vae/saved")
    (path,) = tmp_path.rglob("*.safetensors")
    written, made = load_file(path), load_file(decoder_file)
    assert written.keys() == made.keys()
    assert all(torch.equal(written[name], made[name]) for name in made)


def test_model_save_writes_what_stock_writes(comfy, remote, local, tmp_path):
    from comfy_extras.nodes_model_merging import ModelSave

    up = {"diffusion_model.img_in.lora_up.weight": torch.ones(256, 4)}
    adapters = {**up, "diffusion_model.img_in.lora_down.weight": torch.ones(4, 64)}
    written = []
    for name, model in (("ours", remote), ("stock", local)):
        node = ModelSave()
        node.output_dir = str(tmp_path / name)
        node.save(comfy.comfy.sd.load_lora_for_models(model, None, adapters, 0.5, 0.0)[0], "model/saved")
        (path,) = (tmp_path / name).rglob("*.safetensors")
        written.append(load_file(path))
    ours, stock = written
    assert ours.keys() == stock.keys()
    assert all(torch.allclose(ours[name], stock[name], atol=1e-6) for name in ours)


def seamless(vae: Any) -> None:
    """As nodes for seamless tiles do."""
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"


def hooked(vae: Any) -> None:
    vae.first_stage_model.decoder.conv_in.register_forward_hook(lambda _module, _given, found: 0.5 * found)


def replaced(vae: Any) -> None:
    vae.first_stage_model.decode = print


def softer(vae: Any) -> None:
    vae.process_output = lambda image: image.add_(1.0).div_(4.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [(seamless, "padding_mode was changed"), (hooked, "forward hook"), (softer, "process_output"), (None, "")],
)
def test_a_changed_stock_vae_decodes_in_comfyui(change, said, comfy, remote, decoder_file, xsample, relative_error):
    stock = comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(decoder_file)))
    if change is not None:
        change(stock)
    samples, image, note = xsample(remote, vae=stock)
    assert note.startswith("fused: 4 steps")
    assert ("decodes in ComfyUI" in note) is (change is not None)
    assert said in note
    assert relative_error(image, stock.decode(samples)) <= TOLERANCE


@pytest.mark.parametrize(
    ("change", "said"),
    [(seamless, "padding_mode was changed"), (hooked, "forward hook"), (replaced, "decode was replaced")],
)
def test_a_vae_that_a_node_changed_is_refused(change, said, vae):
    change(vae)
    with pytest.raises(Unsupported, match=said):
        vae.decode(torch.zeros(1, 16, 4, 4))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_vae_in_fp8_is_cast_as_stock_does(dtype, comfy, connected, decoder_file, tmp_path, relative_error):
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    path = tmp_path / "fp8.safetensors"
    save_file({name: each.to(dtype) for name, each in load_file(decoder_file).items()}, path)
    stock = comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(path)))
    z = torch.randn(1, 16, 6, 7, generator=torch.Generator().manual_seed(1))
    assert relative_error(load_vae(str(path)).decode(z), stock.decode(z)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("decoder.conv_in.weight_scale", torch.ones(()), "no scales of a VAE's weights.*decoder.conv_in.weight_scale"),
        ("decoder.conv_in.comfy_quant", torch.ones(2, dtype=torch.uint8), "decoder.conv_in.comfy_quant"),
        ("scaled_fp8", torch.zeros(2, dtype=torch.float8_e4m3fn), "scaled_fp8"),
        ("decoder.conv_in.weight", torch.ones(3, dtype=torch.int8), "int8"),
    ],
)
def test_a_vae_in_other_packed_formats_is_refused(name, tensor, said, connected, decoder_file, tmp_path):
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    save_file({**load_file(decoder_file), name: tensor}, tmp_path / "packed.safetensors")
    with pytest.raises(Unsupported, match=f"^packed: .*{said}"):
        load_vae(str(tmp_path / "packed.safetensors"))
