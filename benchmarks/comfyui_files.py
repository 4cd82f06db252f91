"""Write what benchmarks/comfyui_path.py loads: a FLUX.1 transformer, a VAE, and a LoRA on all linear layers."""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import flux_weights
import torch
from safetensors.torch import save_file

from xditd.client.demo import checkpoints

RANK = 16
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write_in_place(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file from tensors on a GPU, straight into its mapped pages.

    ``save_file`` would hold 22 GiB twice on the host before it writes the first byte.
    """
    header: dict[str, object] = {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 256)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + at)
    mapped = torch.from_file(str(path), shared=True, size=start + at, dtype=torch.uint8)
    for tensor in tensors.values():
        mapped[start : start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        start += tensor.nbytes


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
