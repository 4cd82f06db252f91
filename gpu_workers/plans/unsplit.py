"""Classes whose tokens ranks cannot split, or without gain, and why."""

from __future__ import annotations

from typing import Final

_PART_OF_UNET: Final = "a part of UNets, between convolutions and group normalizations that see the whole image"

PLANS: Final = {
    "DreamLiteTransformer2DModel": _PART_OF_UNET,
    "LuminaNextDiT2DModel": "attention is scaled by the length of the sequence, which the class reads from its tokens",
    "NucleusMoEImageTransformer2DModel": (
        "each expert picks its tokens among all of the image, so that every layer needs all tokens on every rank"
    ),
    "PriorTransformer": "its tokens are those of one prompt and four more: ranks would send more than they save",
    "RFD4ProteinaTransformer": "layers update a representation of all pairs of tokens, with sums over third tokens",
    "SanaTransformer2DModel": (
        "attention is linear, with sums over all tokens, and a convolution in every block sees neighbouring rows"
    ),
    "Transformer2DModel": _PART_OF_UNET,
}
