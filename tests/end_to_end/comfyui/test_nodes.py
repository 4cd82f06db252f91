"""The nodes in a real ComfyUI with real workers give the results of the stock nodes."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from xditd.client import StaleSource, Unsupported

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 2e-6


@pytest.fixture(scope="session")
def spoiled_file(files, tmp_path_factory) -> Path:
    """The checkpoint with one tensor zeroed, for which every comparison has to fail."""
    return zeroed(files.transformer, "single_blocks.0.linear2.bias", tmp_path_factory.mktemp("zeroed"))


@pytest.fixture
def spoiled(connected, spoiled_file) -> Any:
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return load_unet(str(spoiled_file))


@pytest.fixture
def spoiled_local(comfy, spoiled_file) -> Any:
    return comfy.comfy.sd.load_diffusion_model(str(spoiled_file))


def zeroed(path: Path, name: str, folder: Path) -> Path:
    tensors = load_file(path)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, folder / path.name)
    return folder / path.name


def lora(seed: int, kind: str = "own") -> dict[str, torch.Tensor]:
    """A LoRA with the checkpoint's names, or with diffusers', where q, k and v are separate."""
    generator = torch.Generator().manual_seed(seed)

    def pair(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.1 * torch.randn(rows, 4, generator=generator), 0.1 * torch.randn(4, columns, generator=generator)

    found = {}
    if kind == "own":
        for name, rows in (("double_blocks.0.img_attn.qkv", 768), ("single_blocks.1.linear2", 256)):
            up, down = pair(rows, 256 if rows == 768 else 1280)
            found[f"diffusion_model.{name}.lora_up.weight"] = up
            found[f"diffusion_model.{name}.lora_down.weight"] = down
    else:
        for name in ("transformer_blocks.1.attn.to_k", "single_transformer_blocks.0.attn.to_v"):
            up, down = pair(256, 256)
            found[f"transformer.{name}.lora_B.weight"] = up
            found[f"transformer.{name}.lora_A.weight"] = down
    return found


@pytest.mark.parametrize("kind", ["own", "diffusers"])
@pytest.mark.parametrize("through", ["loader", "accelerate"])
def test_lora_at_two_strengths(
    kind, through, comfy, remote, spoiled, local, spoiled_local, conditioning, ksample, latent, relative_error
):
    from xditd.client.comfyui.accelerate import accelerate

    def with_lora(model: Any, strength: float) -> Any:
        return comfy.comfy.sd.load_lora_for_models(model, None, lora(3, kind), strength, 0.0)[0]

    def run(model: Any) -> torch.Tensor:
        return ksample(model, conditioning(1), conditioning(2), dict(latent))

    base = remote if through == "loader" else accelerate(local)
    plain = run(local)
    for strength in (1.0, 0.4):
        expected = run(with_lora(local, strength))
        assert relative_error(expected, plain) > 1e-3
        model = with_lora(base, strength) if through == "loader" else accelerate(with_lora(local, strength))
        assert relative_error(run(model), expected) <= TOLERANCE
        wrong = with_lora(spoiled, strength) if through == "loader" else accelerate(with_lora(spoiled_local, strength))
        assert relative_error(run(wrong), expected) > 10 * TOLERANCE
    assert relative_error(run(base), plain) <= TOLERANCE


@pytest.mark.parametrize("through", ["loader", "accelerate"])
def test_lora_on_a_model_that_was_made_under_dynamic_vram(
    through, comfy, connected, files, local, conditioning, ksample, latent, relative_error, monkeypatch
):
    """With DynamicVRAM linear layers have no parameters until they are loaded, but LoRAs need the names."""
    from xditd.client.comfyui.accelerate import accelerate
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    with monkeypatch.context() as dynamic:
        dynamic.setattr(comfy.comfy.memory_management, "aimdo_enabled", True)
        path = str(files.transformer)
        model = load_unet(path) if through == "loader" else accelerate(comfy.comfy.sd.load_diffusion_model(path))
    patched, expected = (
        comfy.comfy.sd.load_lora_for_models(each, None, lora(3), 1.0, 0.0)[0] for each in (model, local)
    )
    run = functools.partial(ksample, positive=conditioning(1), negative=conditioning(2), latent=dict(latent))
    assert relative_error(run(patched), run(expected)) <= TOLERANCE
    assert relative_error(run(model), run(local)) <= TOLERANCE


def test_same_model_again_lends_nothing_and_another_strength_patches_in_place(
    daemon, remote, conditioning, ksample, latent
):
    def run(strength: float) -> None:
        patched = remote.clone()
        patched.add_patches(differences, strength)
        ksample(patched, conditioning(1), conditioning(2), dict(latent))

    differences = {"diffusion_model.single_blocks.1.linear2.weight": ("diff", (0.1 * torch.randn(256, 1280),))}
    run(1.0)
    before = remote.weights.loan
    ksample(remote, conditioning(1), conditioning(2), dict(latent))
    run(0.5)
    run(0.6)
    mine = [each for each in daemon.status().components if each.component_id == remote.weights.loan.component_id]
    assert before.component_id != remote.weights.loan.component_id
    assert len(mine) == 1
    assert mine[0].generation == 2
    held = remote.weights.loan
    run(0.6)
    assert len(daemon.status().components) == 1
    assert held.lent_bytes == remote.weights.loan.lent_bytes


def test_unloading_takes_the_loan_back(comfy, daemon, remote, conditioning, ksample, latent):
    first = ksample(remote, conditioning(1), conditioning(2), dict(latent))
    assert len(daemon.status().components) == 1
    comfy.comfy.model_management.unload_all_models()
    assert not daemon.status().components
    assert torch.equal(ksample(remote, conditioning(1), conditioning(2), dict(latent)), first)


@torch.inference_mode()  # as ComfyUI runs its nodes
def test_a_file_that_is_written_over_between_prompts(
    comfy, connected, files, local, conditioning, ksample, latent, relative_error, tmp_path
):
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    path = tmp_path / "x.safetensors"
    shutil.copy(files.transformer, path)
    model, given = load_unet(str(path)), (conditioning(1), conditioning(2))
    ksample(model, *given, dict(latent))
    tensors = {name: 0.5 * tensor for name, tensor in load_file(files.transformer).items()}
    save_file(tensors, tmp_path / "new.safetensors")
    path.write_bytes((tmp_path / "new.safetensors").read_bytes())
    for _ in range(2):  # while it is lent, and when it would be lent again
        with pytest.raises(StaleSource, match=r"x\.safetensors: changed since a loader read it .*queue again"):
            ksample(model, *given, dict(latent))
        comfy.comfy.model_management.unload_all_models()
    for read in (model.model_state_dict_for_saving, model.get_key_patches):  # nodes that save, and that merge
        with pytest.raises(StaleSource, match=r"x\.safetensors: changed since a loader read it"):
            read()
    halved = comfy.comfy.sd.load_diffusion_model(str(path))
    expected = ksample(halved, *given, dict(latent))
    assert relative_error(ksample(load_unet(str(path)), *given, dict(latent)), expected) <= 2e-6
    assert relative_error(expected, ksample(local, *given, dict(latent))) > 1e-3


def test_vae_decodes(vae, stock_vae, decoder_file, tmp_path, relative_error):
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    z = torch.randn(2, 16, 14, 16, generator=torch.Generator().manual_seed(1))
    expected = stock_vae.decode(z)
    assert expected.std() > 0.05
    assert relative_error(vae.decode(z), expected) <= TOLERANCE
    wrong = load_vae(str(zeroed(decoder_file, "decoder.up.1.block.0.norm1.bias", tmp_path)))
    assert relative_error(wrong.decode(z), expected) > 10 * TOLERANCE
    tiles = dict(tile_x=16, tile_y=16, overlap=4)
    z = 0.3 * torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(1))
    assert relative_error(vae.decode_tiled(z, **tiles), stock_vae.decode_tiled(z, **tiles)) <= TOLERANCE


def test_a_file_that_is_written_over_while_a_loader_reads_it(connected, files, decoder_file, monkeypatch, tmp_path):
    from xditd.client.comfyui.nodes import unet_loader, vae_loader

    for module, load, reader, source in (
        (unet_loader, unet_loader.load_unet, "read_with_metadata", files.transformer),
        (vae_loader, vae_loader.load_vae, "read_checkpoint", decoder_file),
    ):
        path = tmp_path / "x.safetensors"
        shutil.copy(source, path)
        read = getattr(module, reader)

        def read_and_write(path, read=read):
            found = read(path)
            os.utime(path, ns=(0, 0))
            return found

        monkeypatch.setattr(module, reader, read_and_write)
        with pytest.raises(StaleSource, match=r"x\.safetensors: changed while a loader read it"):
            load(str(path))


def test_a_vae_whose_file_was_written_over_is_not_saved(connected, decoder_file, tmp_path):
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    path = tmp_path / "x.safetensors"
    shutil.copy(decoder_file, path)
    vae = load_vae(str(path))
    save_file({name: 0.5 * tensor for name, tensor in load_file(decoder_file).items()}, tmp_path / "new.safetensors")
    path.write_bytes((tmp_path / "new.safetensors").read_bytes())
    with pytest.raises(StaleSource, match=r"x\.safetensors: changed since a loader read it"):
        vae.get_sd()


@torch.inference_mode()
def test_vae_encodes(comfy, connected, whole_file, tmp_path, relative_error):
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    vae = load_vae(str(whole_file))
    stock = comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(whole_file)))
    pixels = torch.rand(1, 112, 128, 3, generator=torch.Generator().manual_seed(2))
    expected = stock.encode(pixels)
    assert relative_error(vae.encode(pixels), expected) <= TOLERANCE
    wrong = load_vae(str(zeroed(whole_file, "encoder.down.2.block.1.norm2.bias", tmp_path)))
    assert relative_error(wrong.encode(pixels), expected) > 10 * TOLERANCE
    tiles = dict(tile_x=64, tile_y=64, overlap=16)
    assert relative_error(vae.encode_tiled(pixels, **tiles), stock.encode_tiled(pixels, **tiles)) <= TOLERANCE
    z = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    assert relative_error(vae.decode(z), stock.decode(z)) <= TOLERANCE


@pytest.mark.parametrize("which", ["xdit", "stock", "none"])
def test_fused_sampler(
    which, xsample, remote, spoiled, local, vae, stock_vae, conditioning, ksample, latent, relative_error
):
    chosen = {"xdit": vae, "stock": stock_vae, "none": None}[which]
    samples, image, note = xsample(remote, vae=chosen)
    assert note.startswith("fused: 4 steps")
    expected = ksample(local, conditioning(1), conditioning(2), dict(latent))
    assert relative_error(samples, expected) <= TOLERANCE
    assert relative_error(xsample(spoiled)[0], expected) > 10 * TOLERANCE
    if which == "none":
        assert image is None
    else:
        assert relative_error(image, stock_vae.decode(expected)) <= 1e-5


def test_fused_sampler_from_an_image_and_a_stock_model(xsample, local, conditioning, ksample, relative_error):
    start = {"samples": torch.randn(2, 16, 16, 14, generator=torch.Generator().manual_seed(9))}
    more = dict(denoise=0.6, scheduler="beta")
    samples, _, note = xsample(local, latent_image=dict(start), **more)
    assert note.startswith("fused: 4 steps")
    expected = ksample(local, conditioning(1), conditioning(2), dict(start), **more)
    assert relative_error(samples, expected) <= TOLERANCE


@pytest.mark.parametrize(("more", "said"), [({"sampler_name": "dpmpp_2m"}, "dpmpp_2m"), ({"cfg": 2.5}, "cfg 2.5")])
def test_what_is_not_fused_runs_step_by_step_and_says_so(
    more, said, xsample, remote, local, conditioning, ksample, latent, relative_error
):
    samples, _, note = xsample(remote, **more)
    assert note.startswith("step by step")
    assert said in note
    expected = ksample(local, conditioning(1), conditioning(2), dict(latent), **more)
    assert relative_error(samples, expected) <= TOLERANCE


def test_previews_come_with_every_fused_step(comfy, xsample, remote, local, conditioning, ksample, latent, monkeypatch):
    previews: list[Any] = []

    def update(bar: Any, value: int, total: int, preview: Any = None) -> None:
        previews.append(preview)

    arguments = comfy.comfy.cli_args.args
    monkeypatch.setattr(arguments, "preview_method", comfy.comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(comfy.comfy.utils.ProgressBar, "update_absolute", update)
    _, _, note = xsample(remote)
    assert note.startswith("fused: 4 steps")
    fused, previews[:] = [np.asarray(preview[1]).astype(int) for preview in previews], []
    ksample(local, conditioning(1), conditioning(2), dict(latent))
    stock = [np.asarray(preview[1]).astype(int) for preview in previews]
    assert len(fused) == len(stock) == 4
    # A preview that is read while the workers write the next one may show some of it; the last one has no next.
    assert np.abs(fused[-1] - stock[-1]).max() <= 1
    assert np.abs(fused[0] - fused[-1]).max() > 10


def test_progress_and_interrupt(comfy, daemon, xsample, remote, monkeypatch, wait_until):
    management = comfy.comfy.model_management
    seen: list[int] = []

    def update(bar: Any, value: int, total: int, preview: Any = None) -> None:
        seen.append(value)
        if value == 2:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.comfy.utils.ProgressBar, "update_absolute", update)
    with pytest.raises(management.InterruptProcessingException):
        xsample(remote, steps=200)
    assert seen == [1, 2]
    wait_until(lambda: not daemon.status().jobs, "the cancelled job to leave")
    seen.clear()
    _, _, note = xsample(remote, steps=1)
    assert seen == [1]
    assert note.startswith("fused")


def test_what_cannot_run_is_refused_by_name(remote, conditioning, ksample, latent):
    patched = remote.clone()
    patched.set_model_attn1_patch(lambda *_: None)
    with pytest.raises(Unsupported, match="attn1_patch"):
        ksample(patched, conditioning(1), conditioning(2), dict(latent))
    masked = conditioning(1)
    masked[0][1] |= {"attention_mask": torch.ones(1, 80, 80), "attention_mask_img_shape": (8, 8)}
    with pytest.raises(Unsupported, match="Apply Style Model"):
        ksample(remote, masked, conditioning(2), dict(latent))


def test_wrappers_of_other_nodes_run_around_the_workers(remote, local, conditioning, ksample, latent, relative_error):
    from comfy.patcher_extension import WrappersMP

    calls = []

    def double(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return 0.5 * executor(*args, **kwargs)

    found = []
    for model in (remote, local):
        wrapped = model.clone()
        wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", double)
        found.append(ksample(wrapped, conditioning(1), conditioning(2), dict(latent)))
    assert len(calls) == 8
    assert relative_error(*found) <= TOLERANCE


@pytest.mark.parametrize("what", ["context", "y", "guidance"])
def test_conditioning_that_another_node_changes_between_steps_is_seen_at_once(
    what, comfy, remote, local, conditioning, ksample, latent, relative_error
):
    from comfy.patcher_extension import WrappersMP

    positions = {"context": 2, "y": 3, "guidance": 4}
    wanted = {"context": (1, 16, 4096), "y": (1, 768), "guidance": (1,)}[what]
    found = []
    for model in (remote, local):
        calls: list[int] = []

        def change(executor: Any, *args: Any, calls: list[int] = calls, **kwargs: Any) -> torch.Tensor:
            calls.append(1)
            values = list(args)
            assert values[positions[what]].shape == wanted
            if len(calls) in (2, 3):  # the same change twice, and back
                values[positions[what]] = 0.5 * values[positions[what]]
            return executor(*values, **kwargs)

        wrapped = model.clone()
        wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", change)
        positive = conditioning(1, guidance=3.3)
        found.append(ksample(wrapped, positive, conditioning(2), dict(latent), steps=5))
        assert len(calls) == 5
    assert relative_error(*found) <= TOLERANCE
    plain = ksample(local, conditioning(1, guidance=3.3), conditioning(2), dict(latent), steps=5)
    assert relative_error(found[0], plain) > 10 * TOLERANCE


def test_conditioning_lies_on_the_device_that_samples(comfy, remote, local):
    from comfy.conds import CONDConstant, CONDRegular
    from comfy.patcher_extension import WrapperExecutor, WrappersMP

    from xditd.client.comfyui.accelerate import accelerate
    from xditd.client.comfyui.fused_sampler import FusedEuler
    from xditd.client.comfyui.placement import place_conditioning

    def run(sampler: Any) -> dict[str, Any]:
        conds = {"positive": [{"model_conds": dict(given), "uuid": 1}], "negative": []}
        guider = SimpleNamespace(conds=conds, model_patcher=SimpleNamespace(load_device=torch.device("meta")))
        executor = WrapperExecutor.new_class_executor(lambda guider, *_: guider.conds, sampler, [place_conditioning])
        found: dict[str, Any] = executor.execute(guider, None)["positive"][0]["model_conds"]
        return found

    given = {"c_crossattn": CONDRegular(torch.zeros(1, 16, 64)), "named": CONDConstant("a"), "other": object()}
    placed = run(object())
    assert type(placed["c_crossattn"]) is CONDRegular
    assert placed["c_crossattn"].cond.device.type == "meta"
    assert given["c_crossattn"].cond.device.type == "cpu"  # the node's own, which later prompts use again
    assert (placed["named"], placed["other"]) == (given["named"], given["other"])
    assert run(FusedEuler(remote.weights, remote.family, None)) == given
    for model in (remote, accelerate(local)):
        assert [place_conditioning] in model.wrappers[WrappersMP.SAMPLER_SAMPLE].values()


def test_no_step_asks_how_much_memory_is_free(comfy, remote, local, conditioning, ksample, latent, monkeypatch):
    from xditd.client import Client

    asked: list[Any] = []
    forwards: list[Any] = []
    management = comfy.comfy.model_management

    def noted(function: Any, calls: list[Any]) -> Any:
        return lambda *given, **more: calls.append(given) or function(*given, **more)

    def runs(model: Any, steps: int) -> tuple[int, int]:
        asked.clear()
        forwards.clear()
        ksample(model, conditioning(1), conditioning(2), dict(latent), cfg=3.0, steps=steps)
        return len(asked), len(forwards)

    monkeypatch.setattr(management, "get_free_memory", noted(management.get_free_memory, asked))
    monkeypatch.setattr(Client, "call_parts", noted(Client.call_parts, forwards))
    runs(remote, 2)
    (few, two), (many, six) = runs(remote, 2), runs(remote, 6)
    assert (two, six) == (2, 6)  # both rows of a step in one request
    assert few == many
    assert runs(local, 6)[0] >= runs(local, 2)[0] + 4  # as ComfyUI does otherwise


def test_status_node(connected):
    from xditd.client.comfyui.nodes.status import XditStatus

    assert "workers   ready: 2 on cpu" in XditStatus.execute().result[0]
