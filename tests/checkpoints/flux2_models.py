"""For tests, and programs beside them: seeded checkpoints of FLUX.2, plain diffusers on them, and inputs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from xditd.gpu_workers.families.flux2.checkpoint import Flux2
from xditd.gpu_workers.families.flux2.config import Flux2Config

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel

State = dict[str, torch.Tensor]
DEV = Flux2Config(hidden=256, double_blocks=2, single_blocks=2, context_channels=96, has_guidance=True)
KLEIN = replace(DEV, has_guidance=False)


def state_dict(seed: int, config: Flux2Config = DEV, *, dtype: torch.dtype = torch.float32, prefix: str = "") -> State:
    """Make a checkpoint in the layout of the configuration. Activations keep their size, and every tensor matters."""
    tensors = {}
    for entry in Flux2().entries(config, ()):
        # By name, so that a tensor is the same in a checkpoint of another configuration.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{entry.source}".encode()))
        values = torch.randn(entry.shape, generator=generator)
        values = 1.0 + 0.3 * values if len(entry.shape) == 1 else values / math.sqrt(entry.shape[1])
        tensors[prefix + entry.source] = values.to(dtype)
    return tensors


def reference(state: State, config: Flux2Config = DEV, device: str = "cpu") -> Flux2Transformer2DModel:
    """Build diffusers' own class from a checkpoint, with nothing of ours."""
    from diffusers import Flux2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    converted = convert_flux2_transformer_checkpoint_to_diffusers(dict(state)) if config.is_original else state
    module = Flux2Transformer2DModel(
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        num_attention_heads=config.hidden // 128,
        joint_attention_dim=config.context_channels,
        guidance_embeds=config.has_guidance,
    )
    module.load_state_dict(converted)
    dtype = next(iter(state.values())).dtype
    return module.to(device, dtype).eval().requires_grad_(False)


def ids(size: tuple[int, int], tokens: int, references: Sequence[tuple[int, int]] = ()) -> dict[str, torch.Tensor]:
    """Make the ids of an image, of references to it, and of a text, as diffusers' pipeline does."""
    places = [(0, size), *((10 + 10 * number, each) for number, each in enumerate(references))]
    of_image = [
        torch.cartesian_prod(torch.tensor([first]), torch.arange(rows), torch.arange(columns), torch.tensor([0]))
        for first, (rows, columns) in places
    ]
    zero = torch.tensor([0])
    return {
        "img_ids": torch.cat(of_image).float(),
        "txt_ids": torch.cartesian_prod(zero, zero, zero, torch.arange(tokens)).float(),
    }


def inputs(
    rows: int, tokens: int, size: tuple[int, int], config: Flux2Config = DEV, references: Sequence[tuple[int, int]] = ()
) -> dict[str, Any]:
    """Make the arguments of a forward, the same in every process."""
    generator = torch.Generator().manual_seed(rows * 10_000 + tokens * 100 + sum(size))
    places = ids(size, tokens, references)
    given: dict[str, Any] = {
        "hidden_states": torch.randn(rows, len(places["img_ids"]), 128, generator=generator),
        "encoder_hidden_states": torch.randn(rows, tokens, config.context_channels, generator=generator),
        "timestep": torch.linspace(0.7, 0.2, rows),
        **places,
    }
    return given | ({"guidance": torch.full((rows,), 3.5)} if config.has_guidance else {})


@torch.no_grad()
def pipeline_latents(
    module: Flux2Transformer2DModel,
    *,
    noise: torch.Tensor,
    steps: int,
    conditioning: Mapping[str, Any],
    sigmas: Sequence[float] | None = None,
    references: Sequence[torch.Tensor] = (),
    has_cache: bool = False,
    **given: Any,
) -> torch.Tensor:
    """Sample with diffusers' own pipeline and the scheduler of the released models, (batch, 128, height, width).

    ``references`` are latents, as the pipeline's VAE would make them; with ``has_cache`` by klein's pipeline for them.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2KleinPipeline, Flux2Pipeline
    from PIL import Image

    shifts = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    scheduler = FlowMatchEulerDiscreteScheduler(**(shifts if sigmas is None else {}))
    parts = {"scheduler": scheduler, "vae": None, "text_encoder": None, "tokenizer": None, "transformer": module}
    is_klein = not module.config.guidance_embeds
    if has_cache:
        pipeline = Flux2KleinKVPipeline(**parts)
        given.pop("guidance_scale", None)
    else:
        pipeline = Flux2KleinPipeline(**parts, is_distilled=False) if is_klein else Flux2Pipeline(**parts)
    if references:
        # Any images, and in place of the VAE what it would make of them.
        given["image"] = [Image.new("RGB", (64, 64)) for _ in references]
        made = [each[None] for each in references]
        vae = torch.nn.Identity()
        vae.device, vae.dtype = torch.device("cpu"), torch.float32
        pipeline.register_modules(vae=vae)
        pipeline._encode_vae_image = lambda image, generator: made.pop(0)
    pipeline.set_progress_bar_config(disable=True)
    caught: dict[str, torch.Tensor] = {}

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        caught.update(tensors)
        return tensors

    try:
        pipeline(
            latents=noise,
            height=noise.shape[2] * 16,
            width=noise.shape[3] * 16,
            num_inference_steps=steps,
            sigmas=None if sigmas is None else list(sigmas),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=keep,
            **conditioning,
            **given,
        )
    except AttributeError:  # klein's takes the statistics of its VAE, which is not there, for latents too
        if not is_klein:
            raise
    return caught["latents"].transpose(1, 2).unflatten(2, noise.shape[2:])


def relative_error(ours: torch.Tensor, right: torch.Tensor) -> float:
    return float((ours.double() - right.double()).norm() / right.double().norm())
