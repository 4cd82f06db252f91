"""Classes of sound: the tokens of the audio attend to each other, and to the whole text, which is not split."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Count, Split, TokenPlan

_AUDIO: Final = Attention(queries=("audio",), keys=("audio",))
_TEXT: Final = Attention(queries=("audio",), keys=())

STABLE_AUDIO: Final = TokenPlan(
    splits={
        # The first token is that of the time and of the global conditions.
        "transformer_blocks.0": {"hidden_states": Split("audio")},
        "transformer_blocks.*": {
            "rotary_embedding": Split("audio", dim=0),
            # The attention pads a mask that has another number of keys than it is given.
            "attention_mask": Split("audio"),
        },
    },
    gathers={"proj_out": {0: Split("audio")}},
    attentions={"transformer_blocks.*.attn1": _AUDIO, "transformer_blocks.*.attn2": _TEXT},
)

ACE_STEP: Final = TokenPlan(
    splits={
        "layers.0": {"hidden_states": Split("audio")},
        # The mask of the sliding window, in every second layer, is one of the whole sequence.
        "layers.*": {"position_embeddings": Split("audio", dim=0)},
    },
    # A transposed convolution follows.
    gathers={"layers.-1": {0: Split("audio")}},
    attentions={"layers.*.self_attn": _AUDIO, "layers.*.cross_attn": _TEXT},
    # With these the window is no mask, but is given to the backend where there are more keys than it is wide.
    refused_backends=("flash", "flash_hub", "flash_varlen", "flash_varlen_hub"),
)

STABLE_AUDIO_3: Final = TokenPlan(
    splits={
        "transformer_blocks.0": {"hidden_states": Split("audio")},
        "transformer_blocks.*": {
            "rope": Split("audio", dim=0),
            # For inpainting: all tokens but the memory's, which come first.
            "local_seq": Split("audio", is_suffix=True),
            "num_memory_tokens": Count("audio"),
        },
    },
    # The memory's tokens are cut off behind the last block.
    gathers={"transformer_blocks.-1": {0: Split("audio")}},
    attentions={
        # Differential attention: the second is taken from the first.
        "transformer_blocks.*.self_attn": Attention(queries=("audio",), keys=("audio",), others=(_AUDIO,)),
        "transformer_blocks.*.cross_attn": Attention(queries=("audio",), keys=(), others=(_TEXT,)),
    },
)

MINIMAX_MUSIC_3: Final = TokenPlan(
    splits={
        "rotary_emb": {0: Split("audio", dim=0), 1: Split("audio", dim=0)},
        "transformer_blocks.0": {"hidden_states": Split("audio")},
    },
    # The token of the time, which comes first, is cut off behind the last block.
    gathers={"transformer_blocks.-1": {0: Split("audio")}},
    attentions={"transformer_blocks.*.attn": _AUDIO},
)

LONG_CAT_AUDIO: Final = TokenPlan(
    splits={
        "blocks.0": {"hidden_states": Split("audio")},
        "blocks.*": {"mask": Split("audio"), "rope": Split("audio", dim=0)},
    },
    # The sum with what the first block was given follows.
    gathers={"blocks.-1": {0: Split("audio")}},
    attentions={"blocks.*.self_attn": _AUDIO, "blocks.*.cross_attn": _TEXT},
    optional=("blocks.*.cross_attn",),
)

PLANS: Final = {
    "StableAudioDiTModel": STABLE_AUDIO,
    "StableAudio3DiTModel": STABLE_AUDIO_3,
    "AceStepTransformer1DModel": ACE_STEP,
    "MiniMaxMusic3Transformer1DModel": MINIMAX_MUSIC_3,
    "LongCatAudioDiTTransformer": LONG_CAT_AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": "each of its few tokens attends to those before it alone",
    "T5FilmDecoder": "its attention is computed by functions of its own, with a causal mask of a fixed length",
}
