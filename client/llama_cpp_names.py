"""llama.cpp's names of a text encoder's tensors, in the names of transformers' ``T5EncoderModel``.

Converters of diffusion models keep the names of the original checkpoint; those of text encoders do not.

Source: llama.cpp, ``gguf-py/gguf/tensor_mapping.py`` and ``constants.py`` (``T5ENCODER``).
"""

from __future__ import annotations

import re
from typing import Final

ENCODER: Final = re.compile(r"^enc\.blk\.(\d{1,4})\.(\w+)\.weight$")
"""Names of the tensors of an encoder's blocks, with the block's number and the part."""

_PARTS: Final = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_OTHERS: Final = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    "output.weight": "lm_head.weight",
}


def transformers_name(name: str) -> str:
    """Return the name of a tensor in transformers; one that is not known is returned as it is."""
    found = ENCODER.match(name)
    if found is not None and found[2] in _PARTS:
        return f"encoder.block.{int(found[1])}.{_PARTS[found[2]]}.weight"
    if name.startswith("dec."):
        return "decoder." + name.removeprefix("dec.")  # no encoder reads it
    return _OTHERS.get(name, name)
