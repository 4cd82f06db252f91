"""Build language models of transformers, whose hidden states are text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from xditd.gpu_workers.families.language_models.config import HEAD_SIZE, LanguageModelConfig
from xditd.gpu_workers.models.decoders import DecoderOperations
from xditd.gpu_workers.models.full_precision import decode_in_float32
from xditd.gpu_workers.models.operations import Model
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest


class LanguageModelOperations(DecoderOperations):
    """See :class:`~xditd.gpu_workers.models.operations.TextEncoderOperations`."""

    def build(self, config: LanguageModelConfig) -> torch.nn.Module:
        from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

        given: dict[str, Any] = {
            "vocab_size": config.vocabulary,
            "hidden_size": config.width,
            "intermediate_size": config.inner,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.key_heads,
            "head_dim": HEAD_SIZE,
            "rms_norm_eps": config.epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "max_position_embeddings": limits.MAX_TEXT_TOKENS,
            "use_cache": False,
        }
        if config.has_head_norms:
            model: Any = Qwen3Model(Qwen3Config(**given))
        else:
            model = MistralModel(MistralConfig(**given, sliding_window=None))
        if not config.has_final_norm:
            model.norm = torch.nn.Identity()
        decode_in_float32(model)
        return cast(torch.nn.Module, model)

    def encode(
        self, model: Model[LanguageModelConfig], token_ids: torch.Tensor, *, layers: Sequence[int] = (), **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not layers and not model.config.has_final_norm:
            raise BadRequest(
                f"layers: the file holds the first {model.config.layers} layers alone, without the norm behind the "
                "last; ask for the states of layers, such as (10, 20, 30), or lend the whole model"
            )
        return super().encode(model, token_ids, layers=layers, **more)
