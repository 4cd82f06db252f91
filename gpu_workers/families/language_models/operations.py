"""Build language models of transformers, and encode text to their hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from xditd.gpu_workers.families.language_models.config import HEAD_SIZE, LanguageModelConfig
from xditd.gpu_workers.models.full_precision import decode_in_float32
from xditd.gpu_workers.models.operations import Model
from xditd.ipc import limits
from xditd.ipc.facts import TextEncoderFacts


class LanguageModelOperations:
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
        decode_in_float32(model)
        return cast(torch.nn.Module, model)

    def fuse(self, *_: object) -> None:
        """There are no fused kernels."""

    def facts(self, config: LanguageModelConfig) -> TextEncoderFacts:
        return TextEncoderFacts(
            width=config.width, max_tokens=limits.MAX_TEXT_TOKENS, has_pooled=False, layers=config.layers
        )

    def vocabulary(self, config: LanguageModelConfig) -> int:
        return config.vocabulary

    @torch.inference_mode()
    def encode(
        self,
        model: Model[LanguageModelConfig],
        token_ids: torch.Tensor,
        *,
        pooled: bool,
        mask: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module = cast(Any, model.module)
        states = module.embed_tokens(token_ids.to(model.device))
        found = module(
            inputs_embeds=states,
            attention_mask=None if mask is None else mask.to(model.device),
            output_hidden_states=bool(layers),
        )
        if not layers:
            return cast(torch.Tensor, found.last_hidden_state), None
        return torch.cat([found.hidden_states[number] for number in layers], dim=-1), None
