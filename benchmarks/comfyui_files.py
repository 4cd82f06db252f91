"""Write what benchmarks/comfyui_path.py loads: a FLUX.1 transformer, a VAE, and a LoRA on all linear layers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import flux_weights
import torch
from checkpoint_files import write_in_place
from safetensors.torch import save_file

from xditd.client.demo import checkpoints

RANK = 16


def lora_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A LoRA of rank 16 on every linear layer, small enough to leave pictures pictures."""
    found = {}
    generator = torch.Generator().manual_seed(8)
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        found[f"{layer}.lora_up.weight"] = 0.02 * torch.randn(shape[0], RANK, generator=generator)
        found[f"{layer}.lora_down.weight"] = 0.02 * torch.randn(RANK, shape[1], generator=generator)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    started = time.perf_counter()
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    size = flux_weights.SMALL if given.small else flux_weights.FULL
    weights = flux_weights.state_dict(size, dtype, given.device, 0)
    write_in_place(weights, given.models / "diffusion_models" / "flux.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    save_file(lora_of(shapes, dtype), given.models / "loras" / "lora.safetensors")
    channels = (64, 128, 256, 256) if given.small else (128, 256, 512, 512)
    vae = checkpoints.flux_vae_state_dict(3, channels=channels, encoder=not given.small, dtype=dtype)
    save_file(vae, given.models / "vae" / "ae.safetensors")
    print(f"files written in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
