"""Classes of video alone, or with audio, of which each is unlike the others."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Cache, CachedTokens, Split, Splits, TokenPlan, is_given

_VIDEO: Final = Attention(queries=("video",), keys=("video",))
_TEXT: Final = Attention(queries=("video",), keys=())

KANDINSKY_5: Final = TokenPlan(
    splits={
        "visual_transformer_blocks.0": {"visual_embed": Split("video")},
        "visual_transformer_blocks.*": {"rope": Split("video")},
    },
    # Tokens are ordered as frames, rows and columns behind the last block.
    gathers={"visual_transformer_blocks.-1": {0: Split("video")}},
    attentions={
        "visual_transformer_blocks.*.self_attention": _VIDEO,
        "visual_transformer_blocks.*.cross_attention": _TEXT,
    },
    whole=("text_transformer_blocks.*.self_attention",),
    # Sparse attention chooses its blocks of tokens from all queries and keys.
    refused={"sparse_params": is_given},
)

COSMOS: Final = TokenPlan(
    splits={
        "rope": {0: Split("video", dim=0), 1: Split("video", dim=0)},
        "transformer_blocks.0": {"hidden_states": Split("video")},
        "transformer_blocks.*": {
            # A time for each frame, for models that continue videos.
            "embedded_timestep": Split("video", ndim=3),
            "temb": Split("video", ndim=3),
            "extra_pos_emb": Split("video"),
            "controlnet_residual": Split("video"),
        },
        "norm_out": {"embedded_timestep": Split("video", ndim=3), "temb": Split("video", ndim=3)},
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={
        "transformer_blocks.*.attn1": _VIDEO,
        # The second is that to the tokens of an image.
        "transformer_blocks.*.attn2": Attention(queries=("video",), keys=(), others=(_TEXT,)),
    },
)

MINIMAX_H3: Final = TokenPlan(
    splits={
        # One sequence of text, conditions, audio and video, in the order in which the caller packs them.
        "rope": {0: Split("packed", dim=0), 1: Split("packed", dim=0)},
        "transformer_blocks.0": {"hidden_states": Split("packed")},
        "transformer_blocks.*": {"adaln_indices": Split("packed", dim=0)},
        "norm_out": {"timestep_indices": Split("packed", dim=0)},
    },
    gathers={"proj_out": {0: Split("packed")}, "audio_proj_out": {0: Split("packed")}},
    attentions={"transformer_blocks.*.attn": Attention(queries=("packed",), keys=("packed",))},
    whole=("token_refiner.refiner_blocks.*.attn",),
)

_TEXT_THEN_VIDEO: Final = Attention(queries=("text", "video"), keys=("text", "video"))
_FIRST_BLOCK: Final[Splits] = {"hidden_states": Split("video"), "encoder_hidden_states": Split("text")}

COG_VIDEO_X: Final = TokenPlan(
    splits={"": {"image_rotary_emb": Split("video", dim=0)}, "transformer_blocks.0": _FIRST_BLOCK},
    gathers={"proj_out": {0: Split("video")}},
    attentions={"transformer_blocks.*.attn1": _TEXT_THEN_VIDEO},
)

CONSIS_ID: Final = TokenPlan(
    splits={"": {"image_rotary_emb": Split("video", dim=0)}, "transformer_blocks.0": _FIRST_BLOCK},
    # The text, joined again with the video behind the last block, is cut off by the number of all its tokens.
    gathers={"transformer_blocks.-1": {0: Split("video"), 1: Split("text")}},
    attentions={"transformer_blocks.*.attn1": _TEXT_THEN_VIDEO},
    # Each token of the video attends to those of the face, of which every rank has all.
    whole=("local_facial_extractor.layers.*.0", "perceiver_cross_attention.*"),
    optional=("local_facial_extractor.layers.*.0", "perceiver_cross_attention.*"),
)

ALLEGRO: Final = TokenPlan(
    splits={
        "transformer_blocks.0": {"hidden_states": Split("video")},
        "transformer_blocks.*": {
            # A pair: tables of frequencies, and each token's places in them.
            "image_rotary_emb": Split("video", item=1),
            # The attention pads a mask that has another number of keys than it is given.
            "attention_mask": Split("video", dim=2),
        },
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={"transformer_blocks.*.attn1": _VIDEO, "transformer_blocks.*.attn2": _TEXT},
)

EASY_ANIMATE: Final = TokenPlan(
    splits={
        "rope_embedding": {0: Split("video", dim=0), 1: Split("video", dim=0)},
        "transformer_blocks.0": _FIRST_BLOCK,
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={"transformer_blocks.*.attn1": _TEXT_THEN_VIDEO},
)

MOCHI: Final = TokenPlan(
    splits={
        "rope": {0: Split("video", dim=0), 1: Split("video", dim=0)},
        "transformer_blocks.0": _FIRST_BLOCK,
        "transformer_blocks.*": {"encoder_attention_mask": Split("text")},
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={
        # Each sample alone: its video and those tokens of its text that are no padding.
        "transformer_blocks.*.attn1": Attention(queries=("video", "text"), keys=("video", "text"), picks=True)
    },
    whole=("time_embed.pooler",),
)

_FUSED: Final = "visual_transformer_blocks"

KANDINSKY_6: Final = TokenPlan(
    splits={
        f"{_FUSED}.0": {"vis": Split("video"), "aud": Split("audio")},
        f"{_FUSED}.*": {"vis_rope": Split("video", dim=0), "aud_rope": Split("audio", dim=0)},
    },
    # The video's tokens are ordered as frames, rows and columns behind the last block.
    gathers={f"{_FUSED}.-1": {0: Split("video"), 1: Split("audio")}},
    attentions={
        f"{_FUSED}.*.video_dec_block.self_attention": _VIDEO,
        f"{_FUSED}.*.video_dec_block.cross_attention": _TEXT,
        f"{_FUSED}.*.audio_dec_block.self_attention": Attention(queries=("audio",), keys=("audio",)),
        f"{_FUSED}.*.audio_dec_block.cross_attention": Attention(queries=("audio",), keys=()),
        f"{_FUSED}.*.va_cross_attention": Attention(queries=("video",), keys=("audio",)),
        f"{_FUSED}.*.av_cross_attention": Attention(queries=("audio",), keys=("video",)),
    },
    whole=("video_text_transformer_blocks.*.attn", "audio_text_transformer_blocks.*.attn"),
)

_SINK: Final = CachedTokens(read="sink")
_HISTORY: Final = CachedTokens(read="history")
_CAPTURED: Final = CachedTokens(written=("video",))

SANA_WM_REFINER: Final = TokenPlan(
    splits={
        "": {
            "hidden_states": Split("video"),
            "timestep": Split("video"),
            # Of each head, or of all of them.
            "video_rotary_emb": Split("video", dim=-2),
        }
    },
    gathers={"proj_out": {0: Split("video")}},
    attentions={
        "transformer_blocks.*.attn1": Attention(queries=("video",), keys=("sink", "history", "video")),
        "transformer_blocks.*.attn2": _TEXT,
    },
    # The class has those of LTX-2, and leaves them out.
    whole=tuple(
        f"transformer_blocks.*.{name}"
        for name in ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    ),
    # The caller puts what one call has captured where the next ones read it, often a part of it.
    cache=Cache(
        "kv_cache",
        tensors={
            "sink_pe": CachedTokens(read="sink", dim=-2),
            "sink_k_pre": _SINK,
            "sink_v": _SINK,
            "history_k": _HISTORY,
            "history_v": _HISTORY,
            "captured_k_pre": _CAPTURED,
            "captured_v_pre": _CAPTURED,
            "captured_k_post": _CAPTURED,
            "captured_v_post": _CAPTURED,
        },
        is_read=lambda given: given.get("kv_cache_mode") in ("inject", "inject_and_capture_post_rope"),
    ),
)

PLANS: Final = {
    "CogVideoXTransformer3DModel": COG_VIDEO_X,
    "ConsisIDTransformer3DModel": CONSIS_ID,
    "AllegroTransformer3DModel": ALLEGRO,
    "EasyAnimateTransformer3DModel": EASY_ANIMATE,
    "MochiTransformer3DModel": MOCHI,
    "Kandinsky6Transformer3DModel": KANDINSKY_6,
    "Kandinsky5Transformer3DModel": KANDINSKY_5,
    "CosmosTransformer3DModel": COSMOS,
    "MiniMaxH3Transformer3DModel": MINIMAX_H3,
    "Cosmos3OmniTransformer": (
        "the tokens that are made attend to those of the text, which every rank has, and to each other in one call; "
        "the text's attention is causal"
    ),
    "Kandinsky6SRTransformer3DModel": "sparse attention chooses its blocks of tokens from all queries and keys",
    "LatteTransformer3DModel": "its blocks attend in turn within a frame and along time, with other orders of tokens",
    "TransformerTemporalModel": "its attention is along time alone, with frames as its tokens",
    "MotifVideoTransformer3DModel": (
        "its last blocks, how many the configuration says, join a second copy of the video in place of the text"
    ),
    "SanaVideoTransformer3DModel": "linear attention sums over all tokens, and convolutions mix their neighbours",
    "SanaWMTransformer3DModel": "recurrent attention along time, and convolutions, mix its tokens",
    "SanaWMLTX2RefinerTransformer3DModel": SANA_WM_REFINER,
}
