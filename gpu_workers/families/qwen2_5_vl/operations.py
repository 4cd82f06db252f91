"""Build the language model of Qwen2.5-VL, and encode texts to its hidden states after the final norm."""

from __future__ import annotations

from typing import Any, Final, cast

import torch

from xditd.gpu_workers.families.qwen2_5_vl.config import Qwen25VlConfig
from xditd.gpu_workers.models.full_precision import decode_in_float32
from xditd.gpu_workers.models.operations import Model
from xditd.ipc import limits
from xditd.ipc.facts import TextEncoderFacts

ROPE_THETA: Final = 1e6
ROPE_SECTIONS: Final = (16, 24, 24)
EPSILON: Final = 1e-6


class Qwen25VlOperations:
    """See :class:`~xditd.gpu_workers.models.operations.TextEncoderOperations`."""

    def build(self, config: Qwen25VlConfig) -> torch.nn.Module:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        model: Any = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=config.inner,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.key_heads,
                rms_norm_eps=EPSILON,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": ROPE_THETA,
                    "mrope_section": list(ROPE_SECTIONS),
                },
                max_position_embeddings=limits.MAX_TEXT_TOKENS,
                use_cache=False,
            )
        )
        decode_in_float32(model)
        return cast(torch.nn.Module, model)

    def fuse(self, *_: object) -> None:
        """There are no fused kernels."""

    def facts(self, config: Qwen25VlConfig) -> TextEncoderFacts:
        return TextEncoderFacts(width=config.width, max_tokens=limits.MAX_TEXT_TOKENS, has_pooled=False)

    def vocabulary(self, config: Qwen25VlConfig) -> int:
        return config.vocabulary

    @torch.inference_mode()
    def encode(
        self, model: Model[Qwen25VlConfig], token_ids: torch.Tensor, *, pooled: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module = cast(Any, model.module)
        states = module.embed_tokens(token_ids.to(model.device))
        return cast(torch.Tensor, module(inputs_embeds=states).last_hidden_state), None
