"""Generate small checkpoints of a FLUX.1 transformer and its VAE, with the tensor names of published files.

The random values are scaled so that activations keep their size from layer to layer and every tensor matters: zeroing
any one changes the result by far more than the tolerance of a parity check, so such a check detects a lost tensor.
(The only exception, in any VAE of this kind, is ``mid.attn_1.k.bias``: it adds the same number to all logits of a
query, which softmax ignores.) The same seed gives the same bytes in every process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xditd.client.output_files import write_file

if TYPE_CHECKING:
    import torch

HEAD_SIZE = 128
MLP_RATIO = 4
DATA_ALIGNMENT_BYTES = 256
PACKED_CHANNELS = 64
TIMESTEP_CHANNELS = 256
LATENT_CHANNELS = 16
VAE_CHANNELS = (64, 64, 128, 128)
VAE_RESIDUALS = 2

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def flux1_state_dict(
    seed: int,
    *,
    heads: int = 2,
    double_blocks: int = 2,
    single_blocks: int = 2,
    guidance: bool = True,
    context_dim: int = 4096,
    pooled_dim: int = 768,
    dtype: torch.dtype | None = None,
    prefix: str = "",
    norm_suffix: str = "scale",
) -> dict[str, torch.Tensor]:
    """Generate a FLUX.1 transformer: dev with ``guidance``, schnell without. The default has 8 million parameters.

    ``prefix`` is put before every name (``model.diffusion_model.``); ``norm_suffix`` ends the names of query and key
    norms, ``scale`` or ``weight``. ``dtype`` is float32 unless given.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in _flux1_shapes(heads, double_blocks, single_blocks, guidance, context_dim, pooled_dim):
        if name.endswith("_norm.scale"):
            values = 1.0 + 0.3 * normal(seed, name, shape)
        elif name.endswith(".bias"):
            values = 0.2 * normal(seed, name, shape)
        else:
            values = normal(seed, name, shape) / math.sqrt(shape[1])
        if name.endswith("_norm.scale"):
            name = name.removesuffix("scale") + norm_suffix
        tensors[prefix + name] = values if dtype is None else values.to(dtype)
    return tensors


def flux_vae_state_dict(
    seed: int,
    *,
    channels: tuple[int, ...] = VAE_CHANNELS,
    encoder: bool = True,
    dtype: torch.dtype | None = None,
    prefix: str = "",
) -> dict[str, torch.Tensor]:
    """Generate a VAE with FLUX.1's structure: four levels, two residual blocks in each, 16 latent channels.

    ``channels`` are multiples of 64, the largest last: with fewer, a norm group has one channel, and hides its bias.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in _vae_shapes(channels, encoder):
        values = _vae_values(seed, name, shape)
        tensors[prefix + name] = values if dtype is None else values.to(dtype)
    return tensors


def write_flux1(path: Path, seed: int, *, dtype: torch.dtype | None = None) -> None:
    """Write the demo transformer to one safetensors file."""
    save_aligned(flux1_state_dict(seed, dtype=dtype), path)


def write_flux_vae(path: Path, seed: int, *, dtype: torch.dtype | None = None) -> None:
    """Write the demo VAE to one safetensors file."""
    save_aligned(flux_vae_state_dict(seed, dtype=dtype), path)


def save_aligned(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file whose data starts at a multiple of 256 bytes.

    The format requires only 8, but workers on the CPU copy tensors that do not start at a multiple of 64. Metadata,
    which readers skip, fills the gap.
    """
    from safetensors.torch import save

    def file_with(filler: str) -> bytes:
        return save(tensors, metadata={"filler": filler})

    data_start = 8 + int.from_bytes(file_with("")[:8], "little")
    write_file(path, file_with(" " * (-data_start % DATA_ALIGNMENT_BYTES)))


def normal(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw values that depend only on seed and name, so that adding a tensor changes no other."""
    import torch

    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)


def _vae_values(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    noise = normal(seed, name, shape)
    if len(shape) == 1:
        return (1.0 if "norm" in name and name.endswith(".weight") else 0.0) + 0.2 * noise
    if shape[2] == 1:
        return noise / math.sqrt(shape[1])
    # Convolutions that mostly blur, so that random latents decode to smooth areas of colour instead of noise.
    line = torch.tensor([0.25, 0.5, 0.25])
    blur = torch.outer(line, line)
    mixing = normal(seed, f"{name}:mixing", shape[:2])[:, :, None, None]
    gain = 0.4 if name.endswith("conv_out.weight") else 1.0
    return gain * (1.5 * mixing * blur + 0.1 * noise) / math.sqrt(shape[1])


def _linear(name: str, rows: int, columns: int) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _flux1_shapes(
    heads: int, double_blocks: int, single_blocks: int, guidance: bool, context_dim: int, pooled_dim: int
) -> Shapes:
    h = heads * HEAD_SIZE
    mlp = MLP_RATIO * h
    yield from _linear("img_in", h, PACKED_CHANNELS)
    yield from _linear("txt_in", h, context_dim)
    embedders = [("time_in", TIMESTEP_CHANNELS), ("vector_in", pooled_dim)]
    for name, columns in embedders + ([("guidance_in", TIMESTEP_CHANNELS)] if guidance else []):
        yield from _linear(f"{name}.in_layer", h, columns)
        yield from _linear(f"{name}.out_layer", h, h)
    for i in range(double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            yield from _linear(f"{block}_mod.lin", 6 * h, h)
            yield from _linear(f"{block}_attn.qkv", 3 * h, h)
            yield f"{block}_attn.norm.query_norm.scale", (HEAD_SIZE,)
            yield f"{block}_attn.norm.key_norm.scale", (HEAD_SIZE,)
            yield from _linear(f"{block}_attn.proj", h, h)
            yield from _linear(f"{block}_mlp.0", mlp, h)
            yield from _linear(f"{block}_mlp.2", h, mlp)
    for i in range(single_blocks):
        block = f"single_blocks.{i}"
        yield from _linear(f"{block}.modulation.lin", 3 * h, h)
        yield from _linear(f"{block}.linear1", 3 * h + mlp, h)
        yield f"{block}.norm.query_norm.scale", (HEAD_SIZE,)
        yield f"{block}.norm.key_norm.scale", (HEAD_SIZE,)
        yield from _linear(f"{block}.linear2", h, h + mlp)
    yield from _linear("final_layer.adaLN_modulation.1", 2 * h, h)
    yield from _linear("final_layer.linear", PACKED_CHANNELS, h)


def _conv(name: str, out: int, width: int, size: int = 3) -> Shapes:
    yield f"{name}.weight", (out, width, size, size)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _residual(name: str, width: int, out: int) -> Shapes:
    yield from _norm(f"{name}.norm1", width)
    yield from _conv(f"{name}.conv1", out, width)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out)
    if width != out:
        yield from _conv(f"{name}.nin_shortcut", out, width, size=1)


def _middle(side: str, width: int) -> Shapes:
    yield from _residual(f"{side}.mid.block_1", width, width)
    yield from _norm(f"{side}.mid.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{side}.mid.attn_1.{part}", width, width, size=1)
    yield from _residual(f"{side}.mid.block_2", width, width)


def _vae_shapes(channels: tuple[int, ...], encoder: bool) -> Shapes:
    top, levels = channels[-1], len(channels)
    if encoder:
        width = channels[0]
        yield from _conv("encoder.conv_in", width, 3)
        for level, out in enumerate(channels):
            for i in range(VAE_RESIDUALS):
                yield from _residual(f"encoder.down.{level}.block.{i}", width, out)
                width = out
            if level < levels - 1:
                yield from _conv(f"encoder.down.{level}.downsample.conv", out, out)
        yield from _middle("encoder", top)
        yield from _norm("encoder.norm_out", top)
        yield from _conv("encoder.conv_out", 2 * LATENT_CHANNELS, top)
    width = top
    yield from _conv("decoder.conv_in", top, LATENT_CHANNELS)
    yield from _middle("decoder", top)
    for level in reversed(range(levels)):
        for i in range(VAE_RESIDUALS + 1):
            yield from _residual(f"decoder.up.{level}.block.{i}", width, channels[level])
            width = channels[level]
        if level > 0:
            yield from _conv(f"decoder.up.{level}.upsample.conv", width, width)
    yield from _norm("decoder.norm_out", width)
    yield from _conv("decoder.conv_out", 3, width)
