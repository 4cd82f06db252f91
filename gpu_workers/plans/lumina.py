"""Lumina 2 and Z-Image: each sample's tokens of text and image are joined without padding between, behind refiners."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

_IMAGE: Final = Attention(queries=("image",), keys=("image",))
_JOINT: Final = Attention(queries=("joint",), keys=("joint",))

Z_IMAGE: Final = TokenPlan(
    splits={
        "noise_refiner.0": {"x": Split("image")},
        "noise_refiner.*": {"freqs_cis": Split("image"), "noise_mask": Split("image")},
        # The order of text and image tokens differs between samples, so the joined sequence is one stream.
        "layers.0": {"x": Split("joint")},
        "layers.*": {"freqs_cis": Split("joint"), "noise_mask": Split("joint")},
        "all_final_layer.*": {"noise_mask": Split("joint")},
        "": {"controlnet_block_samples": Split("joint")},
    },
    gathers={"noise_refiner.-1": {0: Split("image")}, "all_final_layer.*": {0: Split("joint")}},
    attentions={"noise_refiner.*.attention": _IMAGE, "layers.*.attention": _JOINT},
    whole=("context_refiner.*.attention", "siglip_refiner.*.attention"),
    # Of the omni models.
    optional=("siglip_refiner.*.attention",),
)

LUMINA_2: Final = TokenPlan(
    splits={
        "noise_refiner.0": {"hidden_states": Split("image")},
        "noise_refiner.*": {"image_rotary_emb": Split("image")},
        "layers.0": {"hidden_states": Split("joint")},
        "layers.*": {"image_rotary_emb": Split("joint")},
    },
    gathers={"noise_refiner.-1": {0: Split("image")}, "norm_out": {0: Split("joint")}},
    attentions={"noise_refiner.*.attn": _IMAGE, "layers.*.attn": _JOINT},
    whole=("context_refiner.*.attn",),
)

PLANS: Final = {"ZImageTransformer2DModel": Z_IMAGE, "Lumina2Transformer2DModel": LUMINA_2}
