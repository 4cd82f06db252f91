"""Write what the suite loads: a FLUX.1 transformer and a VAE, as single files and as a folder of diffusers.

    python benchmarks/checkpoint_files.py FOLDER --device cuda

Weights are random and those of ``flux_weights`` with seed 0. ``made.json`` is written last and says what is there; a
folder that says the same is left as it is. Prints the same as one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import struct
import sys
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flux_weights
import scales
import torch
from measuring import add_arguments

CHECKPOINT = "flux.safetensors"
VAE = "ae.safetensors"
INPUTS = "inputs.safetensors"
DIFFUSERS = "diffusers"
MADE = "made.json"
VAE_SEED = 3
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
WRITERS = 16
PIECE_BYTES = 16 * 2**20


def write_in_place(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file from tensors on any device, straight into its mapped pages, by several threads.

    ``save_file`` would hold 22 GiB twice on the host before it writes the first byte.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
    pieces = []
    for tensor in tensors.values():
        flat = tensor.reshape(-1).view(torch.uint8)
        pieces += [(flat[at : at + PIECE_BYTES], start + at) for at in range(0, flat.numel(), PIECE_BYTES)]
        start += flat.numel()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # other streams do not wait for what fills the tensors
    with ThreadPoolExecutor(WRITERS) as pool:
        deque(pool.map(lambda piece: write_piece(mapped, *piece), pieces), maxlen=0)


def write_piece(mapped: torch.Tensor, piece: torch.Tensor, start: int) -> None:
    """Copy bytes from any device to where they belong in a file's pages.

    Straight from a GPU they would go through one thread, which waits for every page to be made.
    """
    target = mapped[start : start + piece.numel()]
    if piece.is_cuda:
        # A stream of its own: on one stream the copies of all threads would follow one another.
        with torch.cuda.stream(torch.cuda.Stream(piece.device)):
            pinned = torch.empty(piece.numel(), dtype=torch.uint8, pin_memory=True)
            piece = pinned.copy_(piece)
    ctypes.memmove(target.data_ptr(), piece.data_ptr(), piece.numel())


def write_all(folder: Path, scale: scales.Scale, device: str) -> None:
    """Write checkpoints, diffusers' folder, and the inputs of every job."""
    from safetensors.torch import save_file

    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.families.flux1 import reference

    dtype = scales.dtype_on(device)
    weights = flux_weights.state_dict(scale.size, dtype, device, 0)
    write_in_place(weights, folder / CHECKPOINT)
    transformer = reference.transformer_from(weights)
    target = folder / DIFFUSERS / "transformer"
    transformer.save_config(target)
    write_in_place(transformer.state_dict(), target / "diffusion_pytorch_model.safetensors")
    vae = checkpoints.flux_vae_state_dict(VAE_SEED, channels=scale.vae_channels, dtype=dtype)
    save_file(vae, folder / VAE)
    reference.vae_from(vae).save_pretrained(folder / DIFFUSERS / "vae")
    save_file(make_inputs(scale, dtype), folder / INPUTS)


def make_inputs(scale: scales.Scale, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = scale.pixels // 8
    shapes = {
        "prompt_embeds": (1, scale.tokens, 4096),
        "pooled_prompt_embeds": (1, 768),
        "noise": (1, 16, side, side),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def describe(scale: scales.Scale, device: str) -> dict[str, Any]:
    """Everything that decides what is in the folder, and the figures that tables are made with."""
    shapes = flux_weights.shapes(scale.size, scales.dtype_on(device))
    parameters = sum(torch.Size(shape).numel() for _, shape in shapes.values())
    return {
        "device": device,
        "dtype": str(scales.dtype_on(device)).removeprefix("torch."),
        "tensors": len(shapes),
        "parameters": parameters,
        "bytes": parameters * scales.dtype_on(device).itemsize,
        "pixels": scale.pixels,
        "tokens": scale.tokens,
        "steps": scale.steps,
        "parity_steps": scale.parity_steps,
        "floor_ms": scales.floor_ms(scale),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    add_arguments(parser)
    given = parser.parse_args()
    scale = scales.named(given)
    made = describe(scale, given.device)
    marker = given.folder / MADE
    if not marker.exists() or json.loads(marker.read_text()) != made:
        started = time.perf_counter()
        (given.folder / DIFFUSERS / "transformer").mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        write_all(given.folder, scale, given.device)
        marker.write_text(json.dumps(made))
        print(f"files written in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(made))


if __name__ == "__main__":
    main()
