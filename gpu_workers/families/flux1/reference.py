"""Reference results of FLUX.1 by plain diffusers in one process, to compare ours with.

Only diffusers' own converters and pipeline are used, so that a mistake in our key map, models or recipes shows. No
network is used.

    python -m xditd.gpu_workers.families.flux1.reference --transformer F --vae F --inputs IN --out OUT \
        --height 512 --width 512 --steps 4 --guidance 3.5

``IN`` holds ``prompt_embeds``, ``pooled_prompt_embeds``, ``noise`` (batch, 16, height / 8, width / 8) and, if the
schedule is not to be diffusers' own, ``sigmas``. ``OUT`` gets ``latents``, shaped as the noise, and ``image``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

# diffusers' converter splits linear1 at the released models' width.
CONVERTER_HIDDEN = 3072
MLP_RATIO = 4
HEAD_SIZE = 128
SCALING = 0.3611
SHIFT = 0.1159

State = dict[str, torch.Tensor]


def load_transformer(path: Path, *, dtype: torch.dtype | None = None) -> FluxTransformer2DModel:
    """Load a transformer from one safetensors file as diffusers does; ``dtype`` is the file's unless given."""
    return transformer_from(_read(path), dtype=dtype)


def load_vae(path: Path, *, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """Load a VAE from one safetensors file as diffusers does; ``dtype`` is the file's unless given."""
    return vae_from(_read(path), dtype=dtype)


def transformer_from(state: State, *, dtype: torch.dtype | None = None) -> FluxTransformer2DModel:
    """Build diffusers' FLUX.1 transformer from checkpoint tensors; ``state`` is left as it was."""
    from diffusers import FluxTransformer2DModel

    converted = convert_transformer(state)
    hidden, context = converted["context_embedder.weight"].shape
    with torch.device("meta"):
        module = FluxTransformer2DModel(
            in_channels=converted["x_embedder.weight"].shape[1],
            out_channels=converted["proj_out.weight"].shape[0],
            num_layers=_count(converted, "transformer_blocks."),
            num_single_layers=_count(converted, "single_transformer_blocks."),
            attention_head_dim=HEAD_SIZE,
            num_attention_heads=hidden // HEAD_SIZE,
            joint_attention_dim=context,
            pooled_projection_dim=converted["time_text_embed.text_embedder.linear_1.weight"].shape[1],
            guidance_embeds="time_text_embed.guidance_embedder.linear_1.weight" in converted,
        )
    return _load(module, converted, dtype)


def convert_transformer(state: State) -> State:
    """Rename checkpoint tensors with diffusers' own converter.

    The converter takes one spelling of the norms (``.scale``) and one width. For other widths, the parts of ``linear1``
    (query, key, value, MLP) are padded with zero rows to the sizes at which it splits, and narrowed afterwards. No
    value changes.
    """
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    prefix = "model.diffusion_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    bare = {
        name.removesuffix("weight") + "scale" if name.endswith("_norm.weight") else name: tensor
        for name, tensor in bare.items()
    }
    hidden = bare["img_in.weight"].shape[0]
    widths = (CONVERTER_HIDDEN,) * 3 + (CONVERTER_HIDDEN * MLP_RATIO,)
    for name, tensor in bare.items():
        if ".linear1." in name and hidden != CONVERTER_HIDDEN:
            parts = torch.split(tensor, [hidden, hidden, hidden, hidden * MLP_RATIO])
            bare[name] = torch.cat([_pad_with_rows(part, rows) for part, rows in zip(parts, widths, strict=True)])
    converted = cast(State, convert_flux_transformer_checkpoint_to_diffusers(bare))
    for name, tensor in converted.items():
        if name.startswith("single_transformer_blocks.") and any(
            part in name for part in (".to_q.", ".to_k.", ".to_v.", ".proj_mlp.")
        ):
            converted[name] = tensor[: hidden * (MLP_RATIO if ".proj_mlp." in name else 1)]
    return converted


def vae_from(state: State, *, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """Build diffusers' AutoencoderKL with FLUX.1's scaling from checkpoint tensors of a whole VAE."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    bare = {name.removeprefix("first_stage_model.").removeprefix("vae."): tensor for name, tensor in state.items()}
    levels = _count(bare, "decoder.up.")
    channels = tuple(bare[f"decoder.up.{level}.block.0.conv1.weight"].shape[0] for level in range(levels))
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": channels,
        "layers_per_block": _count(bare, "encoder.down.0.block."),
        "latent_channels": bare["decoder.conv_in.weight"].shape[1],
        "scaling_factor": SCALING,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    with torch.device("meta"):
        module = AutoencoderKL(**config)
    return _load(module, convert_ldm_vae_checkpoint(bare, config), dtype)


@torch.no_grad()
def reference_latents(
    transformer: FluxTransformer2DModel,
    *,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    noise: torch.Tensor,
    height: int,
    width: int,
    steps: int,
    guidance_scale: float = 3.5,
    sigmas: Sequence[float] | None = None,
) -> torch.Tensor:
    """Run diffusers' FluxPipeline and return the latents, shaped as ``noise``. ``sigmas`` are used as they are."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    if sigmas is not None:
        scheduler = FlowMatchEulerDiscreteScheduler()
    elif transformer.config.guidance_embeds:
        # scheduler_config.json of FLUX.1-dev.
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # FLUX.1-schnell
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    device, dtype = pipeline.device, pipeline.dtype
    packed = pipeline(
        prompt_embeds=prompt_embeds.to(device, dtype),
        pooled_prompt_embeds=pooled_prompt_embeds.to(device, dtype),
        latents=FluxPipeline._pack_latents(noise.to(device, dtype), *noise.shape),
        height=height,
        width=width,
        num_inference_steps=steps,
        sigmas=None if sigmas is None else list(sigmas),
        guidance_scale=guidance_scale,
        output_type="latent",
        return_dict=False,
    )[0]
    return cast(torch.Tensor, FluxPipeline._unpack_latents(packed, height, width, pipeline.vae_scale_factor))


@torch.no_grad()
def reference_decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents as FluxPipeline does, into (batch, 3, height, width) clamped to [-1, 1]."""
    parameter = next(vae.parameters())
    scaled = latents.to(parameter.device, parameter.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return cast(torch.Tensor, vae.decode(scaled, return_dict=False)[0].clamp(-1.0, 1.0))


@torch.no_grad()
def reference_encode(vae: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
    """Encode an image in [-1, 1] as diffusers' FLUX.1 image-to-image pipelines do, taking the posterior's mode."""
    parameter = next(vae.parameters())
    moments = vae.encode(image.to(parameter.device, parameter.dtype)).latent_dist
    return cast(torch.Tensor, (moments.mode() - vae.config.shift_factor) * vae.config.scaling_factor)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest expected magnitude."""
    difference = (result.double().cpu() - expected.double().cpu()).abs().max()
    return float(difference / expected.double().abs().max().cpu())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m xditd.gpu_workers.families.flux1.reference", description=__doc__)
    for name in ("transformer", "inputs", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="decode the latents too")
    for name in ("height", "width", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="instead of the files' own")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from safetensors.torch import load_file, save_file

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    inputs = load_file(options.inputs)
    sigmas = inputs["sigmas"].tolist() if "sigmas" in inputs else None
    latents = reference_latents(
        load_transformer(options.transformer, dtype=dtype).to(options.device),
        prompt_embeds=inputs["prompt_embeds"],
        pooled_prompt_embeds=inputs["pooled_prompt_embeds"],
        noise=inputs["noise"],
        height=options.height,
        width=options.width,
        steps=options.steps,
        guidance_scale=options.guidance,
        sigmas=sigmas,
    )
    results = {"latents": latents.cpu().contiguous()}
    if options.vae is not None:
        vae = load_vae(options.vae, dtype=dtype).to(options.device)
        results["image"] = reference_decode(vae, latents).cpu().contiguous()
    save_file(results, options.out)


def _read(path: Path) -> State:
    """Read a file into memory that torch has allocated.

    Tensors in a mapped file start at multiples of 8 bytes, at which some CPU kernels add in another order: the last
    bits would depend on how long the file's header is.
    """
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _count(names: State, prefix: str) -> int:
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)}
    return len(numbers)


def _pad_with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


def _load(module: Any, state: State, dtype: torch.dtype | None) -> Any:
    module.load_state_dict(state, strict=True, assign=True)
    return (module if dtype is None else module.to(dtype)).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
