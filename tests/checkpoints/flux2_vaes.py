"""For tests, and programs beside them: seeded VAEs of FLUX.2 in three namings, and plain diffusers on them."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Literal

import torch

from xditd.gpu_workers.families.flux2_vae.checkpoint import Flux2Vae
from xditd.gpu_workers.families.flux2_vae.config import Flux2VaeConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2

State = dict[str, torch.Tensor]
Naming = Literal["comfyui", "original", "diffusers"]
SMALL = Flux2VaeConfig(channels=(64, 64, 64, 128), encoder_channels=(64, 64, 64, 128), residuals=1, has_quant_conv=True)
NARROW = Flux2VaeConfig(
    channels=(64, 64, 64, 64), encoder_channels=(64, 64, 128, 128), residuals=1, has_quant_conv=True
)
"""A decoder that is narrower than the encoder."""


def state_dict(
    seed: int,
    config: Flux2VaeConfig = SMALL,
    *,
    naming: Naming = "comfyui",
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
) -> State:
    """Make a checkpoint; every tensor matters, and images stay in about [-1, 1]."""
    tensors: State = {}
    for entry in Flux2Vae().entries(config, ()):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{entry.source}".encode()))
        values = torch.randn(entry.shape, generator=generator)
        if entry.source == "bn.running_var":
            values = 0.5 + values.abs()
        elif len(entry.shape) == 1:
            is_norm = "norm" in entry.source and entry.source.endswith("weight")
            values = (1.0 if is_norm else 0.0) + 0.2 * values
        else:
            values = values / math.sqrt(math.prod(entry.shape[1:]))
        name = entry.source
        if naming == "diffusers":
            name, values = entry.targets[0][0], values if entry.view is None else values.view(entry.view)
        elif naming == "original" and name.startswith(("quant_conv.", "post_quant_conv.")):
            name = ("decoder." if name.startswith("post_") else "encoder.") + name
        tensors[prefix + name] = values.to(dtype)
    return tensors | {f"{prefix}bn.num_batches_tracked": torch.tensor(7)}


def reference(config: Flux2VaeConfig = SMALL, seed: int = 0) -> AutoencoderKLFlux2:
    """Build diffusers' own class on the weights of :func:`state_dict`."""
    from diffusers import AutoencoderKLFlux2

    module = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=config.encoder_channels,
        decoder_block_out_channels=config.channels,
        layers_per_block=config.residuals,
    )
    module.load_state_dict(state_dict(seed, config, naming="diffusers"))
    return module.eval().requires_grad_(False)


@torch.no_grad()
def reference_decode(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Decode as Flux2Pipeline does after its loop."""
    from diffusers import Flux2Pipeline

    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return vae.decode(Flux2Pipeline._unpatchify_latents(latents * deviation + mean), return_dict=False)[0]


@torch.no_grad()
def reference_encode(vae: AutoencoderKLFlux2, image: torch.Tensor) -> torch.Tensor:
    """Encode as Flux2Pipeline does its references, by its own code."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    pipeline = Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None)
    return pipeline._encode_vae_image(image, None)
