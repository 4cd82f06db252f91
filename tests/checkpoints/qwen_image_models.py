"""For tests, and programs beside them: seeded checkpoints of Qwen-Image, plain diffusers on them, and inputs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from xditd.gpu_workers.families.qwen_image.checkpoint import QwenImage
from xditd.gpu_workers.families.qwen_image.config import SCHEDULER, QwenImageConfig

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

State = dict[str, torch.Tensor]
Size = tuple[int, int]
BASE = QwenImageConfig(hidden=256, blocks=2, text_channels=96)
EDIT_2511 = replace(BASE, has_marker=True)


def state_dict(
    seed: int, config: QwenImageConfig = BASE, *, dtype: torch.dtype = torch.float32, prefix: str = ""
) -> State:
    """Make a checkpoint. Activations keep their size, and every tensor matters."""
    tensors = {}
    for entry in QwenImage().entries(config, ()):
        # By name, so that a tensor is the same in a checkpoint of another configuration.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{entry.source}".encode()))
        values = torch.randn(entry.shape, generator=generator)
        if entry.source.endswith("bias"):
            values = 0.2 * values
        else:
            values = 1.0 + 0.3 * values if len(entry.shape) == 1 else values / math.sqrt(entry.shape[1])
        tensors[prefix + entry.source] = values.to(dtype)
    return tensors


def reference(
    state: State, config: QwenImageConfig = BASE, device: str = "cpu", *, zero_cond_t: bool | None = None
) -> QwenImageTransformer2DModel:
    """Build diffusers' own class from a checkpoint, with nothing of ours."""
    from diffusers import QwenImageTransformer2DModel

    module = QwenImageTransformer2DModel(
        num_layers=config.blocks,
        num_attention_heads=config.hidden // 128,
        joint_attention_dim=config.text_channels,
        zero_cond_t=config.has_marker if zero_cond_t is None else zero_cond_t,
    )
    module.load_state_dict({name: tensor for name, tensor in state.items() if tensor.numel()})
    dtype = next(iter(state.values())).dtype
    return module.to(device, dtype).eval().requires_grad_(False)


def inputs(
    rows: int,
    tokens: int,
    size: Size,
    references: Sequence[Size] = (),
    lengths: Sequence[int] = (),
    config: QwenImageConfig = BASE,
) -> dict[str, Any]:
    """Make the arguments of a forward, the same in every process; ``lengths`` are how many tokens count in each row."""
    generator = torch.Generator().manual_seed(rows * 10_000 + tokens * 100 + sum(size))
    images = [(1, *each) for each in (size, *references)]
    given: dict[str, Any] = {
        "hidden_states": torch.randn(rows, sum(map(math.prod, images)), 64, generator=generator),
        "encoder_hidden_states": torch.randn(rows, tokens, config.text_channels, generator=generator),
        "timestep": torch.linspace(0.7, 0.2, rows),
        "img_shapes": [images] * rows,
    }
    return given | ({"encoder_hidden_states_mask": mask(lengths, tokens)} if lengths else {})


def mask(lengths: Sequence[int], tokens: int) -> torch.Tensor:
    """Make a mask of texts that are padded to ``tokens``, (rows, tokens)."""
    return torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]


def scheduler(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """Make the scheduler of the released models."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**(dict(SCHEDULER) | changes))


@torch.no_grad()
def pipeline_latents(
    module: QwenImageTransformer2DModel,
    *,
    noise: torch.Tensor,
    steps: int,
    conditioning: Mapping[str, Any],
    schedule: FlowMatchEulerDiscreteScheduler | None = None,
    **given: Any,
) -> torch.Tensor:
    """Sample with diffusers' own pipeline, (batch, 16, height, width)."""
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline(
        scheduler=schedule or scheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=module
    )
    pipeline.set_progress_bar_config(disable=True)
    height, width = (side * 8 for side in noise.shape[2:])
    packed = pipeline._pack_latents(noise, *noise.shape)
    found = pipeline(
        latents=packed,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
        return_dict=False,
        **conditioning,
        **given,
    )[0]
    return pipeline._unpack_latents(found, height, width, 8).squeeze(2)


def relative_error(ours: torch.Tensor, right: torch.Tensor) -> float:
    return float((ours.double() - right.double()).norm() / right.double().norm())
