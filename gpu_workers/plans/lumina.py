"""Lumina 2, Z-Image and FIBO 2: the tokens of text and image are joined to one sequence, behind refiners of each."""

from __future__ import annotations

from dataclasses import replace
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

_REPEATS: Final = ("inner_dim", "inner_kv_dim")

LUMINA_2: Final = TokenPlan(
    splits={
        "noise_refiner.0": {"hidden_states": Split("image")},
        "noise_refiner.*": {"image_rotary_emb": Split("image")},
        "layers.0": {"hidden_states": Split("joint")},
        "layers.*": {"image_rotary_emb": Split("joint")},
    },
    gathers={"noise_refiner.-1": {0: Split("image")}, "norm_out": {0: Split("joint")}},
    attentions={
        "noise_refiner.*.attn": replace(_IMAGE, repeats=_REPEATS),
        "layers.*.attn": replace(_JOINT, repeats=_REPEATS),
    },
    whole=("context_refiner.*.attn",),
)

FIBO_2: Final = TokenPlan(
    splits={
        "noise_refiner.0": {"x": Split("image")},
        "noise_refiner.*": {"freqs_cis": Split("image"), "noise_mask": Split("image")},
        "layers.0": {"x": Split("joint")},
        "layers.*": {"freqs_cis": Split("joint"), "noise_mask": Split("joint")},
    },
    # Before the class takes the image's tokens by their number.
    gathers={"noise_refiner.-1": {0: Split("image")}, "layers.-1": {0: Split("joint")}},
    attentions={
        "noise_refiner.*.attention": _IMAGE,
        "layers.*.attention": _JOINT,
        # To the tokens of the text, of which every rank has all.
        "layers.*.cross_attention": Attention(queries=("joint",), keys=()),
    },
    whole=("perceiver.layers.*.cross_attention", "perceiver.layers.*.self_attention"),
    optional=("layers.*.cross_attention",),
)

PLANS: Final = {
    "ZImageTransformer2DModel": Z_IMAGE,
    "Lumina2Transformer2DModel": LUMINA_2,
    "BriaFibo2Transformer2DModel": FIBO_2,
}
