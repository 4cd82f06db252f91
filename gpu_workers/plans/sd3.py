"""Stable Diffusion 3 and 3.5, and AuraFlow: streams of image and of text tokens, joined in every attention."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

_IMAGE: Final = Attention(queries=("image",), keys=("image",))

SD3: Final = TokenPlan(
    splits={
        # The learned positions are added to the whole image.
        "pos_embed": {0: Split("image")},
        "context_embedder": {0: Split("text")},
        "": {"block_controlnet_hidden_states": Split("image")},
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={
        # An IP adapter attends from the image to itself and to the tokens of the image prompt: no stream has those, so
        # that such a call is refused.
        "transformer_blocks.*.attn": Attention(queries=("image", "text"), keys=("image", "text")),
        # Of SD 3.5 medium.
        "transformer_blocks.*.attn2": _IMAGE,
    },
    optional=("transformer_blocks.*.attn2",),
)

AURA_FLOW: Final = TokenPlan(
    splits={
        "pos_embed": {0: Split("image")},
        # Behind the register tokens, which are put before those of the text.
        "joint_transformer_blocks.0": {"encoder_hidden_states": Split("text")},
    },
    gathers={"proj_out": {0: Split("image")}},
    attentions={
        "joint_transformer_blocks.*.attn": Attention(queries=("text", "image"), keys=("text", "image")),
        "single_transformer_blocks.*.attn": Attention(queries=("text", "image"), keys=("text", "image")),
    },
    optional=("single_transformer_blocks.*.attn",),
)

PLANS: Final = {"SD3Transformer2DModel": SD3, "AuraFlowTransformer2DModel": AURA_FLOW}
