"""Parts that several tiny pipelines share: seeded weights, text encoders with tokenizers, images, and results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from class_entry import Random, fill
from diffusers import AutoencoderKL, AutoencoderKLWan
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

PROMPT = "a red bird over a lake"
NEGATIVE_PROMPT = "a blurred bird"
STEPS = {"num_inference_steps": 2, "output_type": "pt"}
TRANSFORMER_AND_VAE = ("transformer", "vae")
WITHOUT_TEXT_ENCODER = {"text_encoder": None, "tokenizer": None}


def seeded(model: torch.nn.Module, seed: int = 0) -> Any:
    """Give a model seeded float32 weights, for inference alone, and return it."""
    fill(model, seed)
    return model.eval().requires_grad_(False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def embeddings(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return what a text encoder would give: normally distributed float32 values."""
    return Random(seed).normal(*shape)


def image(width: int, height: int, seed: int = 2) -> Image.Image:
    """Return a noisy RGB image."""
    values = Random(seed).integers(0, 256, height, width, 3).numpy()
    return Image.fromarray(values.astype(np.uint8))


def mask(width: int, height: int) -> Image.Image:
    """Return a mask whose right half is to be painted."""
    values = np.zeros((height, width), dtype=np.uint8)
    values[:, width // 2 :] = 255
    return Image.fromarray(values)


def tensors(results: Any) -> list[torch.Tensor]:
    """Return the tensors among the results of a pipeline, in order: of lists, arrays and images too."""
    if isinstance(results, torch.Tensor):
        return [results]
    if isinstance(results, (np.ndarray, Image.Image)):
        return [torch.from_numpy(np.array(results))]
    if results is None:
        return []
    if isinstance(results, dict):
        results = results.values()
    if not isinstance(results, Iterable):
        raise TypeError(f"A pipeline returned {type(results).__name__}: tensors() knows no tensors in it.")
    return [tensor for result in results for tensor in tensors(result)]


def kl_vae(latent_channels: int, *, halvings: int = 1, **config: Any) -> AutoencoderKL:
    """Return the image VAE of Stable Diffusion, SD3 and FLUX.1, which halves the sides ``halvings`` times."""
    blocks = halvings + 1
    return seeded(
        AutoencoderKL(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            latent_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(4,) * blocks,
            layers_per_block=1,
            norm_num_groups=1,
            **config,
        ),
        seed=10,
    )


def flux_vae(latent_channels: int, halvings: int = 1) -> AutoencoderKL:
    """Return a VAE with the shift and the scale of FLUX.1, which SD3 and others use too."""
    config = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5035}
    return kl_vae(latent_channels, halvings=halvings, **config)


def wan_vae(z_dim: int) -> AutoencoderKLWan:
    """Return the video VAE of Wan: 8x smaller sides and 4x fewer frames."""
    return seeded(
        AutoencoderKLWan(
            base_dim=3,
            z_dim=z_dim,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1] * z_dim,
            latents_std=[1.5] * z_dim,
        ),
        seed=11,
    )


def tokenizer(max_length: int = 16, *, with_start: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: those of the prompts, and one token for all others.

    ``with_start`` gives it a token for the start of a sequence, as CLIP's and Gemma's have.
    """
    words = sorted({*PROMPT.split(), *NEGATIVE_PROMPT.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>"} if with_start else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        **special,
    )


def clip_text_encoder(hidden_size: int) -> CLIPTextModel:
    return seeded(
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=32,
                hidden_size=hidden_size,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=3,
                eos_token_id=1,
                pad_token_id=0,
            )
        ),
        seed=20,
    )


def t5_text_encoder(hidden_size: int) -> T5EncoderModel:
    return seeded(
        T5EncoderModel(
            T5Config(vocab_size=32, d_model=hidden_size, d_kv=8, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0)
        ),
        seed=21,
    )
