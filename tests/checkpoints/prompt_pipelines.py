"""Tiny seeded pipelines of diffusers with tokenizers and text encoders of their own, in folders, one for each family.

Their transformers are those of the families' other tests. Text encoders have random weights in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import language_models
import qwen2_5_vl_models
import qwen_image_models
import text_checkpoints
import tokenizer_folders
import torch
from safetensors.torch import save_file

QWEN_IMAGE: Final = replace(qwen_image_models.BASE, text_channels=128)
"""Of a transformer that takes the texts of :func:`qwen_image`."""


def flux1(folder: Path) -> None:
    """Save CLIP-L and T5 with their tokenizers under the names of ``FluxPipeline``'s folder."""
    clip_tokens, t5_tokens = tokenizer_folders.clip_tokenizer(), tokenizer_folders.t5_tokenizer()
    tokenizer_folders.save(clip_tokens, folder / "tokenizer")
    tokenizer_folders.save(t5_tokens, folder / "tokenizer_2")
    clip_l(len(clip_tokens), seed=1).save_pretrained(folder / "text_encoder")
    t5(len(t5_tokens) + 28, seed=2).save_pretrained(folder / "text_encoder_2")


def clip_l(vocabulary: int, seed: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
            eos_token_id=vocabulary - 1, bos_token_id=vocabulary - 2,
        )
    ).eval()  # fmt: skip
    state = text_checkpoints.clip_l_state_dict(seed, vocabulary=vocabulary)
    _load(getattr(model, "text_model", model), {name.removeprefix("text_model."): each for name, each in state.items()})
    return model


def t5(vocabulary: int, seed: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary, d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5EncoderModel(config).eval()
    state = text_checkpoints.t5_state_dict(seed, vocabulary=vocabulary)
    _load(model, {**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    return model


def z_image(folder: Path) -> None:
    """Save Qwen3 with its tokenizer, as ``ZImagePipeline``'s folder has them, for 64 channels of texts."""
    tokens = tokenizer_folders.qwen2_tokenizer()
    tokenizer_folders.save(tokens, folder / "tokenizer")
    language_model("qwen3", width=64, layers=3, vocabulary=len(tokens) + 4).save_pretrained(folder / "text_encoder")


def flux2_klein(folder: Path) -> None:
    """Save Qwen3 with its tokenizer, as ``Flux2KleinPipeline``'s folder has them, for 96 channels of texts."""
    tokens = tokenizer_folders.qwen2_tokenizer()
    tokenizer_folders.save(tokens, folder / "tokenizer")
    language_model("qwen3", width=32, layers=28, vocabulary=len(tokens)).save_pretrained(folder / "text_encoder")


def flux2_dev(folder: Path) -> None:
    """Save Mistral's language model with a tokenizer, for 96 channels of texts."""
    tokens = tokenizer_folders.mistral_tokenizer()
    tokenizer_folders.save(tokens, folder / "tokenizer")
    language_model("mistral3", width=32, layers=31, vocabulary=len(tokens)).save_pretrained(folder / "text_encoder")


def wan(folder: Path) -> None:
    """Save UMT5 with its tokenizer, as ``WanPipeline``'s folder has them, for 48 channels of texts."""
    tokens = tokenizer_folders.t5_tokenizer()
    tokenizer_folders.save(tokens, folder / "tokenizer")
    umt5(len(tokens) + 20, width=48).save_pretrained(folder / "text_encoder")


def qwen_image(folder: Path) -> None:
    """Save Qwen2.5-VL with its tokenizer and its processor for 128 channels of texts."""
    made = qwen2_5_vl_models.Processor()
    tokenizer_folders.save(made.tokenizer, folder / "tokenizer")
    tokenizer_folders.save(made.tokenizer, folder / "processor")
    made.image_processor.save_pretrained(folder / "processor")
    saved = folder / "processor" / "preprocessor_config.json"
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "processor_class": "Qwen2_5_VLProcessor"}))
    save_file(qwen2_5_vl_models.state_dict(), folder / "text_encoder.safetensors")


_WRITTEN: Final[dict[str, tuple[Callable[[Path], None], str, str]]] = {
    "z_image": (z_image, "Qwen3ForCausalLM", "Qwen2Tokenizer"),
    "flux2_klein": (flux2_klein, "Qwen3ForCausalLM", "Qwen2Tokenizer"),
    "flux2_dev": (flux2_dev, "MistralForCausalLM", "PreTrainedTokenizerFast"),
    "wan": (wan, "UMT5EncoderModel", "T5TokenizerFast"),
    "qwen_image": (qwen_image, "", "Qwen2Tokenizer"),
}
"""By family: what saves it, and the classes of its encoder and tokenizer. Qwen2.5-VL has no folder."""


def save_texts(family: str, folder: Path) -> None:
    """Save a family's text encoder and tokenizer."""
    _WRITTEN[family][0](folder)


def read_texts(family: str, folder: Path) -> dict[str, Any]:
    """Read what :func:`save_texts` has saved, as the family's pipeline in diffusers takes it."""
    import transformers

    _, encoder, tokenizer = _WRITTEN[family]
    return {
        "text_encoder": getattr(transformers, encoder).from_pretrained(folder / "text_encoder")
        if encoder
        else qwen2_5_vl_models.reference(),
        "tokenizer": getattr(transformers, tokenizer).from_pretrained(folder / "tokenizer"),
    }


def language_model(family: str, *, width: int, layers: int, vocabulary: int) -> Any:
    from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

    known = language_models.CONFIGS[family]
    given: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "rms_norm_eps": known.epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": known.rope_theta},
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    torch.manual_seed(layers)
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**given)).eval()
    return MistralForCausalLM(MistralConfig(**given, sliding_window=None)).eval()


def umt5(vocabulary: int, width: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=64, d_ff=96, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = UMT5EncoderModel(config).eval()
    state = text_checkpoints.umt5_state_dict(4, width=width, inner=96, vocabulary=vocabulary)
    _load(model, {**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    return model


def _load(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(state)
