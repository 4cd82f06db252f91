"""The reference itself: files in, plain diffusers, files out; other widths than the converter's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xditd.client.demo import checkpoints
from xditd.gpu_workers.families.flux1 import reference

SMALL = {"heads": 1, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 32}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("norm_suffix", ["scale", "weight"])
def test_narrow_checkpoints_pass_through_the_converter_untouched(prefix: str, norm_suffix: str) -> None:
    state = checkpoints.flux1_state_dict(0, prefix=prefix, norm_suffix=norm_suffix, **SMALL)
    before = {name: tensor.clone() for name, tensor in state.items()}
    converted = reference.convert_transformer(state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    fused = before[f"{prefix}single_blocks.0.linear1.weight"]
    block = "single_transformer_blocks.0"
    for target, rows in (
        (f"{block}.attn.to_q", slice(0, 128)),
        (f"{block}.attn.to_k", slice(128, 256)),
        (f"{block}.attn.to_v", slice(256, 384)),
        (f"{block}.proj_mlp", slice(384, 896)),
    ):
        assert torch.equal(converted[f"{target}.weight"], fused[rows])
    norm = before[f"{prefix}double_blocks.0.txt_attn.norm.key_norm.{norm_suffix}"]
    assert torch.equal(converted["transformer_blocks.0.attn.norm_added_k.weight"], norm)
    assert sum(tensor.numel() for tensor in converted.values()) == sum(tensor.numel() for tensor in before.values())


def test_the_program_reads_and_writes_files(tmp_path: Path) -> None:
    checkpoints.write_flux1(tmp_path / "flux1.safetensors", 3)
    checkpoints.write_flux_vae(tmp_path / "vae.safetensors", 3)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "prompt_embeds": torch.randn(1, 9, 4096, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 768, generator=generator),
        "noise": torch.randn(1, 16, 4, 6, generator=generator),
    }
    model = reference.transformer_from(checkpoints.flux1_state_dict(3))
    vae = reference.vae_from(checkpoints.flux_vae_state_dict(3))
    for sigmas in (None, [1.0, 0.25]):
        extra = {} if sigmas is None else {"sigmas": torch.tensor(sigmas, dtype=torch.float64)}
        save_file({**inputs, **extra}, tmp_path / "in.safetensors")
        reference.main(
            [
                *("--transformer", str(tmp_path / "flux1.safetensors"), "--vae", str(tmp_path / "vae.safetensors")),
                *("--inputs", str(tmp_path / "in.safetensors"), "--out", str(tmp_path / "out.safetensors")),
                *("--height", "32", "--width", "48", "--steps", "2", "--guidance", "2"),
            ]
        )
        written = load_file(tmp_path / "out.safetensors")
        latents = reference.reference_latents(
            model, **inputs, height=32, width=48, steps=2, guidance_scale=2.0, sigmas=sigmas
        )
        assert torch.equal(written["latents"], latents)
        assert torch.equal(written["image"], reference.reference_decode(vae, latents))


def test_relative_error_is_largest_difference_over_largest_magnitude() -> None:
    expected = torch.tensor([1.0, -4.0])
    assert reference.relative_error(torch.tensor([1.5, -4.0]), expected) == pytest.approx(0.125)
    assert reference.relative_error(expected, expected) == 0.0
