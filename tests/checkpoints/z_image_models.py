"""For tests, and programs beside them: seeded checkpoints of Z-Image, plain diffusers on them, and inputs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from xditd.gpu_workers.families.z_image.checkpoint import ZImage
from xditd.gpu_workers.families.z_image.config import ZImageConfig

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel

State = dict[str, torch.Tensor]
SMALL = ZImageConfig(hidden=256, layers=2, refiners=2, text_channels=64)
COMFYUI = ("layers.0.attention.qkv.weight",)
"""Names that tell ComfyUI's layout; none are diffusers'."""


def state_dict(
    seed: int,
    config: ZImageConfig = SMALL,
    *,
    names: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
) -> State:
    """Make a checkpoint in the layout that ``names`` tell. Activations keep their size, and every tensor matters."""
    tensors = {}
    for entry in ZImage().entries(config, names):
        # By name, so that a tensor is the same in a checkpoint of another configuration.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{entry.source}".encode()))
        values = torch.randn(entry.shape, generator=generator)
        if entry.source.endswith("bias"):
            values = 0.2 * values
        elif len(entry.shape) == 1:
            values = 1.0 + 0.3 * values
        elif "pad_token" not in entry.source:
            values = values / math.sqrt(entry.shape[1])
        tensors[prefix + entry.source] = values.to(dtype)
    return tensors


def reference(state: State, config: ZImageConfig = SMALL, device: str = "cpu") -> ZImageTransformer2DModel:
    """Build diffusers' own class from a checkpoint, with nothing of ours."""
    from diffusers import ZImageTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    is_original = any(name.endswith("attention.qkv.weight") for name in state)
    converted = convert_z_image_transformer_checkpoint_to_diffusers(dict(state)) if is_original else state
    module = ZImageTransformer2DModel(
        dim=config.hidden,
        n_layers=config.layers,
        n_refiner_layers=config.refiners,
        n_heads=config.heads,
        n_kv_heads=config.heads,
        cap_feat_dim=config.text_channels,
        axes_dims=[32, 48, 48],
        axes_lens=[1536, 512, 512],
    )
    module.load_state_dict(converted)
    dtype = next(iter(state.values())).dtype
    return module.to(device, dtype).eval().requires_grad_(False)


def inputs(
    texts: Sequence[int], sizes: Sequence[tuple[int, int]], channels: int = SMALL.text_channels
) -> dict[str, Any]:
    """Make the arguments of a forward, the same in every process: a row for each text, of so many tokens."""
    generator = torch.Generator().manual_seed(sum(texts) * 1000 + sum(map(sum, sizes)))
    return {
        "x": [torch.randn(16, 1, *size, generator=generator) for size in sizes],
        "t": torch.linspace(0.2, 0.7, len(texts)),
        "cap_feats": [torch.randn(tokens, channels, generator=generator) for tokens in texts],
    }


@torch.no_grad()
def pipeline_latents(
    module: ZImageTransformer2DModel,
    *,
    shift: float,
    noise: torch.Tensor,
    steps: int,
    conditioning: Mapping[str, list[torch.Tensor]],
    **given: Any,
) -> torch.Tensor:
    """Sample with diffusers' own pipeline and a scheduler of this shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=module,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        latents=noise,
        height=noise.shape[2] * 8,
        width=noise.shape[3] * 8,
        num_inference_steps=steps,
        output_type="latent",
        return_dict=False,
        **conditioning,
        **given,
    )[0]


def relative_error(ours: torch.Tensor, right: torch.Tensor) -> float:
    return float((ours.double() - right.double()).norm() / right.double().norm())
