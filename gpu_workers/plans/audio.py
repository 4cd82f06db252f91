"""Classes of sound: the tokens of the audio attend to each other, and to the whole text, which is not split."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

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
)

PLANS: Final = {"StableAudioDiTModel": STABLE_AUDIO, "AceStepTransformer1DModel": ACE_STEP}
