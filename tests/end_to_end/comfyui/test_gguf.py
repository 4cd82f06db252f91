"""GGUF files through the XDiT loader: ComfyUI itself reads none, so the reference is stock on the numbers they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import dequantise, write_model
from safetensors.torch import save_file

from xditd.client import BadCheckpoint, Unsupported
from xditd.client.demo import checkpoints

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 2e-6


@pytest.fixture(scope="module", params=["q8_0", "q4_k"])
def written(request, tmp_path_factory) -> tuple[Path, Path]:
    """A GGUF file, and a plain file of the numbers that it means."""
    folder = tmp_path_factory.mktemp("gguf")
    state = checkpoints.flux1_state_dict(1)
    packed = write_model(
        folder / "flux1.gguf", state, lambda name: request.param if "_blocks." in name else None, "flux"
    )
    meant = {name: dequantise(blocks, kind, torch.float32) for name, (kind, blocks) in packed.items()}
    save_file({**state, **meant}, folder / "meant.safetensors")
    return folder / "flux1.gguf", folder / "meant.safetensors"


def load(path: Path, weight_dtype: str = "default") -> Any:
    from xditd.client.comfyui.nodes.unet_loader import load_unet
    from xditd.client.comfyui.stock_dtypes import CHOICES

    return load_unet(str(path), CHOICES[weight_dtype])


def test_sampled_as_the_numbers_that_it_means(
    written, comfy, connected, conditioning, ksample, latent, relative_error, daemon
):
    path, meant = written
    given = conditioning(1), conditioning(2), dict(latent)
    remote = load(path)
    ours = ksample(remote, *given)
    assert remote.weights.loan.copied.total == 0
    expected = ksample(comfy.comfy.sd.load_diffusion_model(str(meant)), *given)
    assert relative_error(ours, expected) <= TOLERANCE
    comfy.comfy.model_management.unload_all_models()
    assert not daemon.status().components
    assert torch.equal(ksample(remote, *given), ours)


def test_what_would_read_its_weights_is_refused(written, comfy, connected, conditioning, ksample, latent):
    path, _ = written
    given = conditioning(1), conditioning(2), dict(latent)
    remote = load(path)
    name = "diffusion_model.single_blocks.1.linear2"
    patched = comfy.comfy.sd.load_lora_for_models(remote, None, {f"{name}.diff": torch.ones(256, 1280)}, 1.0, 0.0)[0]
    with pytest.raises(
        Unsupported, match=r"^flux1: patches .* \(single_blocks.1.linear2.weight\): remove them, or use"
    ):
        ksample(patched, *given)
    for use in (remote.get_key_patches, remote.model_state_dict_for_saving):
        with pytest.raises(Unsupported, match=r"^flux1: weights of a GGUF file cannot be read in ComfyUI"):
            use()
    with pytest.raises(Unsupported, match=r"^flux1: a GGUF file keeps its types; set weight_dtype"):
        load(path, "fp8_e4m3fn")
    ksample(remote, *given)


def test_a_lora_beside_its_weights(written, comfy, connected, conditioning, ksample, latent, relative_error):
    path, meant = written
    name, generator = "diffusion_model.single_blocks.1.linear2", torch.Generator().manual_seed(3)
    shapes = {f"{name}.lora_up.weight": (256, 4), f"{name}.lora_down.weight": (4, 1280)}
    lora = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}

    def run(model: Any) -> torch.Tensor:
        patched = comfy.comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        return ksample(patched, conditioning(1), conditioning(2), dict(latent))

    assert relative_error(run(load(path)), run(comfy.comfy.sd.load_diffusion_model(str(meant)))) <= TOLERANCE


def test_a_damaged_file_is_refused(written, connected, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(written[0].read_bytes()[:-4096])
    with pytest.raises(BadCheckpoint, match=r"damaged\.gguf"):
        load(damaged)


def test_the_loader_lists_it(comfy, tmp_path, monkeypatch):
    import folder_paths

    from xditd.client.comfyui.nodes.unet_loader import XditUnetLoader

    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "flux1-dev-Q4_K_M.gguf").touch()
    (tmp_path / "readme.txt").touch()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (listed, _, _) = XditUnetLoader.define_schema().inputs
    assert listed.options == ["sub/flux1-dev-Q4_K_M.gguf"]
