"""For tests: seeded checkpoints of language models, and transformers' own classes on them."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch

from xditd.gpu_workers.families.language_models.checkpoint import Mistral3, Qwen3
from xditd.gpu_workers.families.language_models.config import LanguageModelConfig

State = dict[str, torch.Tensor]
FAMILIES = {"qwen3": Qwen3(), "mistral3": Mistral3()}
CONFIGS = {
    name: LanguageModelConfig(
        vocabulary=300,
        width=192,
        layers=4,
        heads=2,
        key_heads=1,
        inner=320,
        has_head_norms=family.has_head_norms,
        rope_theta=family.rope_theta,
        epsilon=family.epsilon,
    )
    for name, family in FAMILIES.items()
}


def state_dict(family: str, seed: int, *, prefix: str = "model.", dtype: torch.dtype = torch.float32) -> State:
    """Make a checkpoint in which every tensor matters."""
    tensors: State = {}
    for entry in FAMILIES[family].entries(CONFIGS[family], ()):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{entry.source}".encode()))
        values = torch.randn(entry.shape, generator=generator)
        is_norm, is_table = len(entry.shape) == 1, entry.source == "embed_tokens.weight"
        values = 1.0 + 0.3 * values if is_norm else values if is_table else values / math.sqrt(entry.shape[1])
        tensors[prefix + entry.source] = values.to(dtype)
    return tensors


def reference(family: str, seed: int) -> Any:
    """Build the class that diffusers' pipelines of FLUX.2 take, or its language model, from the same weights."""
    from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config = CONFIGS[family]
    given = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": 128,
        "rms_norm_eps": config.epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**given, tie_word_embeddings=True))
    else:
        model = MistralForCausalLM(MistralConfig(**given, tie_word_embeddings=True, sliding_window=None))
    model.load_state_dict(state_dict(family, seed), strict=False)
    return model.eval().requires_grad_(False)
