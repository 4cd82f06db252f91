"""Tiny seeded pipelines of diffusers with tokenizers and text encoders of their own, in folders, one for each family.

Their transformers are those of the families' other tests. Text encoders have random weights in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import text_checkpoints
import tokenizer_folders
import torch


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


def _load(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(state)
