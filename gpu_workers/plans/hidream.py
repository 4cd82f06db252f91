"""HiDream-I1: image tokens, those of T5, and those of each Llama layer, of which a block takes one after the others."""

from __future__ import annotations

from typing import Final

from xditd.gpu_workers.models.token_plans import Attention, Split, TokenPlan

# The last layer of Llama stays from the start; each block appends that of its own and drops it again.
_STREAMS: Final = ("image", "t5", "llama", "llama")
_JOINT: Final = Attention(queries=_STREAMS, keys=_STREAMS)

HIDREAM: Final = TokenPlan(
    splits={
        "": {"encoder_hidden_states_t5": Split("t5"), "encoder_hidden_states_llama3": Split("llama", dim=-2)},
        "x_embedder": {0: Split("image")},
        # What is made of the image's whole sequence and the lengths of this rank's text.
        "pe_embedder": {0: Split("image", is_prefix=True)},
        "double_stream_blocks.*": {"hidden_states_masks": Split("image")},
        "single_stream_blocks.*": {"hidden_states_masks": Split("image", is_prefix=True)},
    },
    gathers={"final_layer": {0: Split("image")}},
    attentions={"double_stream_blocks.*.block.attn1": _JOINT, "single_stream_blocks.*.block.attn1": _JOINT},
)

PLANS: Final = {"HiDreamImageTransformer2DModel": HIDREAM}
