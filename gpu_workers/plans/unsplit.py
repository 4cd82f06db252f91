"""Image classes whose tokens ranks cannot split, and why."""

from __future__ import annotations

from typing import Final

PLANS: Final = {
    "LuminaNextDiT2DModel": "attention is scaled by the length of the sequence, which the class reads from its tokens",
    "NucleusMoEImageTransformer2DModel": (
        "each expert picks its tokens among all of the image, so that every layer needs all tokens on every rank"
    ),
    "SanaTransformer2DModel": (
        "attention is linear, with sums over all tokens, and a convolution in every block sees neighbouring rows"
    ),
}
