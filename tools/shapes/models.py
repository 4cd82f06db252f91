"""The four models of ``shapes`` at their sizes, and the pipeline's folder that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from shapes.text_tokens import CLIP_TOKENS, clip_tokenizer, clip_vocabulary, t5_pieces, t5_tokenizer, write_tokenizers

LATENT_SCALE: Final = 0.3611
LATENT_SHIFT: Final = 0.1159
"""Of FLUX.1's VAE: the transformer sees (latents - shift) * scale."""
CLIP_WIDTH: Final = 128
T5_WIDTH: Final = 192
PARTS: Final = ("transformer", "vae", "text_encoder", "text_encoder_2")


def build_vae() -> AutoencoderKL:
    """Build FLUX.1's VAE with 64 channels at every level: 1.5 million parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 64, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=256,
        scaling_factor=LATENT_SCALE,
        shift_factor=LATENT_SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


def build_transformer(double_blocks: int = 1, single_blocks: int = 5) -> FluxTransformer2DModel:
    """Build FLUX.1-dev's transformer with two heads of 128: 7.9 million parameters.

    Modulations and the last layer start at zero, so that every block starts as the identity (Peebles and Xie, "Scalable
    Diffusion Models with Transformers", adaLN-Zero).
    """
    model = FluxTransformer2DModel(
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
    )
    modulations = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")
    for name, module in model.named_modules():
        is_last = name.startswith("single_transformer_blocks.") and name.endswith("proj_out")
        if name.endswith(modulations) and not is_last:
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def build_clip() -> CLIPTextModel:
    """Build CLIP-L's text model with two layers of width 128."""
    vocabulary = len(clip_vocabulary()[0])
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=CLIP_WIDTH // 64,
            max_position_embeddings=CLIP_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def build_t5() -> T5EncoderModel:
    """Build the encoder of T5 v1.1 with three layers of width 192.

    Its heads start with a preference for the tokens before, the tokens after, and all near ones, in the manner of ALiBi
    (Press, Smith and Lewis, "Train Short, Test Long", 2022). T5's positions are these biases alone: from zero they
    would take thousands of steps to become so large that a head can tell a token from its neighbour.
    """
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_pieces()),
            d_model=T5_WIDTH,
            d_kv=64,
            d_ff=512,
            num_layers=3,
            num_heads=T5_WIDTH // 64,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )
    near, far = torch.arange(8.0), 8 * 16 ** ((torch.arange(8) + 0.5) / 8)  # tokens in each bucket of distances
    away = torch.cat([near, far])
    beside, opposite, around = -(away - 1).abs(), -3 - 0.5 * away, -0.15 * away
    with torch.no_grad():
        before, after = position_biases(model).unflatten(0, (2, 16))
        before.copy_(torch.stack([beside, opposite, around], 1))
        after.copy_(torch.stack([opposite, beside, around], 1))
    return model


def position_biases(t5: T5EncoderModel) -> torch.Tensor:
    """Return what T5 adds to attention by distance: (32 buckets, 3 heads), first those of tokens before."""
    biases: torch.Tensor = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    return biases


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler of FLUX.1-dev."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def build_pipeline(parts: Mapping[str, torch.nn.Module]) -> FluxPipeline:
    """Join the models of :data:`PARTS` to a pipeline, with the tokenizers and the scheduler."""
    pipeline = FluxPipeline(
        scheduler=build_scheduler(), tokenizer=clip_tokenizer(), tokenizer_2=t5_tokenizer(), **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_parts() -> dict[str, torch.nn.Module]:
    """Build the models of :data:`PARTS` with fresh weights, float32 on the CPU."""
    return {
        "transformer": build_transformer(),
        "vae": build_vae(),
        "text_encoder": build_clip(),
        "text_encoder_2": build_t5(),
    }


def save_weights(module: torch.nn.Module, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model's weights, each once, in the names of published files."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in _published_names(module).items():
        if tensor.data_ptr() in seen or not tensor.is_floating_point():
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.detach().to("cpu", dtype, memory_format=torch.contiguous_format).clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files for their owner alone


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Read what :func:`save_weights` wrote.

    Raises:
        ValueError: the file lacks tensors of the model, or has others.
    """
    own = {name: each for name, each in _published_names(module).items() if each.is_floating_point()}
    found = load_file(path)
    filled = {own[name].data_ptr() for name in found if name in own}
    missing = [name for name, each in own.items() if each.data_ptr() not in filled]
    unexpected = [name for name in found if name not in own]
    if missing or unexpected:
        raise ValueError(f"{path}: lacks {missing[:3]}, has {unexpected[:3]} beside; is it a file of shapes?")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)


def _published_names(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """List a model's tensors. CLIP's modules have lost a prefix since transformers 5.6, published files have it."""
    prefix = "text_model."
    is_bare = isinstance(module, CLIPTextModel) and not hasattr(module, "text_model")
    return {prefix * is_bare + name: tensor for name, tensor in module.state_dict().items()}


def load_parts(folder: Path, parts: Mapping[str, torch.nn.Module]) -> list[str]:
    """Fill models from ``folder/NAME.safetensors`` or a pipeline's folder; return the names of those found."""
    loaded = []
    for name, module in parts.items():
        candidates = (folder / f"{name}.safetensors", folder / name / weights_file(name))
        for path in candidates:
            if path.is_file():
                load_weights(module, path)
                loaded.append(name)
                break
    return loaded


def weights_file(part: str) -> str:
    """Return the name of a model's file in a pipeline's folder."""
    return "model.safetensors" if part.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"


def write_folder(folder: Path, parts: Mapping[str, torch.nn.Module]) -> None:
    """Write diffusers' folder of a ``FluxPipeline`` in bfloat16; every file is below 16 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    classes: dict[str, Any] = {
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5TokenizerFast"),
    }
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1", "_name_or_path": "shapes"}
    index |= {name: list(classes[name]) for name in sorted(classes)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    build_scheduler().save_pretrained(folder / "scheduler")
    write_tokenizers(folder)
    for name in PARTS:
        module: Any = parts[name]
        (folder / name).mkdir(exist_ok=True)
        if name.startswith("text_encoder"):
            module.config.architectures = [type(module).__name__]
            module.config.dtype = torch.bfloat16
            module.config.save_pretrained(folder / name)
        else:
            module.save_config(folder / name)
        save_weights(module, folder / name / weights_file(name))
