"""Krea 2: one sequence of text and image tokens, behind a fusion of the text's layers and refiners of its tokens."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

KREA_2: Final = TokenPlan(
    splits={
        "rotary_emb": {0: Split("joint", dim=0), 1: Split("joint", dim=0)},
        "transformer_blocks.0": {"hidden_states": Split("joint")},
    },
    # Before the class drops the text's tokens by their number.
    gathers={"transformer_blocks.-1": {0: Split("joint")}},
    attentions={
        "transformer_blocks.*.attn": Attention(
            queries=("joint",), keys=("joint",), repeats=("num_heads", "num_kv_heads")
        )
    },
    whole=("text_fusion.layerwise_blocks.*.attn", "text_fusion.refiner_blocks.*.attn"),
    optional=("text_fusion.layerwise_blocks.*.attn", "text_fusion.refiner_blocks.*.attn"),
)

PLANS: Final = {"Krea2Transformer2DModel": KREA_2}
