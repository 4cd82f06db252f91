"""HunyuanVideo: tokens of the video and of the text, in this order, are joined in every attention, with a mask."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Count, Split, Splits, TokenPlan

_JOINT: Final = Attention(queries=("video", "text"), keys=("video", "text"))
_FIRST_BLOCK: Final[Splits] = {"hidden_states": Split("video"), "encoder_hidden_states": Split("text")}
_REFINER: Final = ("context_embedder.token_refiner.refiner_blocks.*.attn",)

HUNYUAN_VIDEO: Final = TokenPlan(
    splits={
        "rope": {0: Split("video", dim=0), 1: Split("video", dim=0)},
        "transformer_blocks.0": _FIRST_BLOCK,
        # From an image: the tokens of the first frame have a time of their own.
        "transformer_blocks.*": {"num_tokens": Count("video")},
        "single_transformer_blocks.*": {"num_tokens": Count("video")},
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={"transformer_blocks.*.attn": _JOINT, "single_transformer_blocks.*.attn": _JOINT},
    whole=_REFINER,
)

FRAMEPACK: Final = TokenPlan(
    splits={
        "transformer_blocks.0": _FIRST_BLOCK,
        # Rotary embeddings of earlier frames are joined with those of the rope.
        "transformer_blocks.*": {"freqs_cis": Split("video", dim=0)},
        "single_transformer_blocks.*": {"image_rotary_emb": Split("video", dim=0)},
    },
    # The tokens of earlier frames, which come first, are cut off behind the last block.
    gathers={"single_transformer_blocks.-1": {0: Split("video")}},
    attentions={"transformer_blocks.*.attn": _JOINT, "single_transformer_blocks.*.attn": _JOINT},
    whole=_REFINER,
)

HUNYUAN_VIDEO_15: Final = TokenPlan(
    splits={
        "rope": {0: Split("video", dim=0), 1: Split("video", dim=0)},
        "transformer_blocks.0": _FIRST_BLOCK,
        # The mask of the text is sorted with the text before.
        "transformer_blocks.*": {"attention_mask": Split("text")},
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={
        "transformer_blocks.*.attn": Attention(queries=("video", "text"), keys=("video", "text"), mask_of_pairs=True)
    },
    whole=_REFINER,
)

PLANS: Final = {
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "HunyuanVideoFramepackTransformer3DModel": FRAMEPACK,
    "HunyuanVideo15Transformer3DModel": HUNYUAN_VIDEO_15,
}
