"""What is refused of the entries, and why; and which models of the tiny pipelines stay in the caller's process."""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """What a refusal says, and the reason for people."""

    says: str
    reason: str


REFUSED_CALLS = {
    "AnyFlowFARTransformer3DModel-kv_write": Refusal(
        "attention_mask.mask_mod: function cannot be sent", "its attention mask, a flex `BlockMask`, holds a function"
    ),
}
"""Calls that no message can carry."""

REFUSED_PIPELINES = {
    "flux-own-attention": Refusal(
        "processor of transformer_blocks.0.attn is a customized_pipelines:HalvedAttention object",
        "an attention processor of the user's own class",
    ),
    "flux-forward-hook": Refusal(
        "_forward_hooks of transformer_blocks.0 is function customized_pipelines:", "a forward hook on a block"
    ),
    "flux-first-block-cache": Refusal("hooks of diffusers, fbc_", "hooks of `enable_cache`"),
    "modular-wan-skip-layer-guidance": Refusal("hooks of diffusers, SkipLayerGuidance", "a guider that sets hooks"),
}
"""Pipelines whose model is changed by functions or classes that workers cannot have."""

LOCAL_MODELS = {name: ("text_encoder",) for name in ("qwen-image-21", "qwen-image-21-edit", "qwen-image-21-uncached")}
"""Models that stay in this process: these pipelines hook into their text encoder during the call."""
