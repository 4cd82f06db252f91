"""Write the files that other parts load: a FLUX.1 transformer and a VAE, as single files and as a folder of diffusers.

    python benchmarks/run.py files FOLDER --device cuda

Weights are random, of seed 0. ``made.json`` is written last and describes the files; a folder with the same description
stays as it is. With ``--comfyui`` FOLDER gets ComfyUI's models instead, with a LoRA on all linear layers.

Needs: a GPU; --device cpu writes in float32
"""

from __future__ import annotations

import argparse
import ctypes
import json
import struct
import subprocess
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flux
import torch
from measuring import Report, add_device, clean_environment, need_gpus, part_command, repeat_ms, say
from safetensors.torch import save_file

from xditd.client.demo import checkpoints

CHECKPOINT = "flux.safetensors"
VAE = "ae.safetensors"
INPUTS = "inputs.safetensors"
DIFFUSERS = "diffusers"
MADE = "made.json"
VAE_SEED = 3
NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
WRITERS = 16
PIECE_BYTES = 16 * 2**20
LORA_RANK = 16


def write_in_place(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file from tensors on any device into its mapped pages, with several threads.

    ``save_file`` would need 22 GiB twice on the host before it writes the first byte.
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
        torch.cuda.synchronize()  # the threads' streams do not wait for the stream that fills the tensors
    with ThreadPoolExecutor(WRITERS) as pool:
        deque(pool.map(lambda piece: write_piece(mapped, *piece), pieces), maxlen=0)


def write_piece(mapped: torch.Tensor, piece: torch.Tensor, start: int) -> None:
    """Copy bytes from any device to their place in a file's mapped pages.

    A direct copy from a GPU would use one thread, which waits for every page fault.
    """
    target = mapped[start : start + piece.numel()]
    if piece.is_cuda:
        # A stream of its own: on one stream the copies of all threads would run one after the other.
        with torch.cuda.stream(torch.cuda.Stream(piece.device)):
            pinned = torch.empty(piece.numel(), dtype=torch.uint8, pin_memory=True)
            piece = pinned.copy_(piece)
    ctypes.memmove(target.data_ptr(), piece.data_ptr(), piece.numel())


def write_all(folder: Path, scale: flux.Scale, device: str) -> None:
    """Write the checkpoints, the folder for diffusers, and the inputs of the jobs."""
    from xditd.gpu_workers.families.flux1 import reference

    dtype = flux.dtype_on(device)
    weights = flux.state_dict(scale.size, dtype, device, 0)
    write_in_place(weights, folder / CHECKPOINT)
    transformer = reference.transformer_from(weights)
    target = folder / DIFFUSERS / "transformer"
    target.mkdir(parents=True, exist_ok=True)
    transformer.save_config(target)
    write_in_place(transformer.state_dict(), target / "diffusion_pytorch_model.safetensors")
    vae = checkpoints.flux_vae_state_dict(VAE_SEED, channels=scale.vae_channels, dtype=dtype)
    save_file(vae, folder / VAE)
    reference.vae_from(vae).save_pretrained(folder / DIFFUSERS / "vae")
    generator, side = torch.Generator().manual_seed(0), scale.pixels // 8
    shapes = {
        "prompt_embeds": (1, scale.tokens, 4096),
        "pooled_prompt_embeds": (1, 768),
        "noise": (1, 16, side, side),
    }
    inputs = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(inputs, folder / INPUTS)


def write_comfyui(models: Path, scale: flux.Scale, device: str) -> None:
    """Write a transformer, a VAE, and a LoRA with small values into ComfyUI's model folders."""
    dtype, generator = flux.dtype_on(device), torch.Generator().manual_seed(8)
    weights, lora = flux.state_dict(scale.size, dtype, device, 0), {}
    write_in_place(weights, models / "diffusion_models" / CHECKPOINT)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            layer, (rows, columns) = f"diffusion_model.{name.removesuffix('.weight')}", tensor.shape
            up, down = (
                0.02 * torch.randn(*shape, generator=generator) for shape in ((rows, LORA_RANK), (LORA_RANK, columns))
            )
            lora |= {f"{layer}.lora_up.weight": up.to(dtype), f"{layer}.lora_down.weight": down.to(dtype)}
    save_file(lora, models / "loras" / "lora.safetensors")
    is_full = scale is flux.FULL
    channels = scale.vae_channels if is_full else (64, 128, 256, 256)
    save_file(
        checkpoints.flux_vae_state_dict(VAE_SEED, channels=channels, encoder=is_full, dtype=dtype), models / "vae" / VAE
    )


def describe(scale: flux.Scale, device: str) -> dict[str, Any]:
    """Return all that determines the folder's content, and the sizes that tables need."""
    dtype = flux.dtype_on(device)
    shapes = flux.shapes(scale.size, dtype)
    parameters = sum(torch.Size(shape).numel() for _, shape in shapes.values())
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(shapes),
        "parameters": parameters,
        "bytes": parameters * dtype.itemsize,
        "pixels": scale.pixels,
        "tokens": scale.tokens,
        "steps": scale.steps,
        "parity_steps": scale.parity_steps,
        "floor_ms": flux.floor_ms(scale.size, scale.pixels, scale.tokens),
    }


def ensure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Write missing files in another process, so that its GPU memory is free afterwards; returns the description."""
    small = ["--small"] if given.small else []
    subprocess.run(
        part_command("files", folder, "--device", given.device, *small), check=True, env=clean_environment(), stdout=2
    )
    made: dict[str, Any] = json.loads((folder / MADE).read_text())
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)
    add_device(parser)
    parser.add_argument("--comfyui", action="store_true", help="FOLDER is a ComfyUI's models")


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("files", 1, given.device)
    scale = flux.scale_of(given)
    made, marker = describe(scale, given.device), given.folder / MADE
    if given.comfyui:
        write_comfyui(given.folder, scale, given.device)
    elif not marker.exists() or json.loads(marker.read_text()) != made:
        given.folder.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        took_ms = repeat_ms(lambda: write_all(given.folder, scale, given.device))[0]
        marker.write_text(json.dumps(made))
        say(f"files written in {took_ms / 1e3:.1f} s")
    report.add(made=made)
