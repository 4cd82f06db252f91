"""The prompts of Qwen-Image as its text encoder takes them: templates, and how many of their tokens are left out.

Sources: diffusers, ``QwenImagePipeline``, ``QwenImageEditPipeline`` and ``QwenImageEditPlusPipeline``
(``prompt_template_encode``, ``prompt_template_encode_start_idx``, ``calculate_dimensions``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

TEMPLATE: Final = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""Of a prompt without pictures."""

TEMPLATE_TOKENS: Final = 34
"""Tokens before the prompt's own, whose states Qwen-Image does not take."""

EDIT_TEMPLATE: Final = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""Of a prompt with pictures, which come before its words."""

EDIT_TEMPLATE_TOKENS: Final = 64
"""As :data:`TEMPLATE_TOKENS`, with pictures."""

EDIT_PIXELS: Final = 1024 * 1024
"""Pixels of the picture of Edit, which its encoder and its VAE both see."""

EDIT_PLUS_PIXELS: Final = 384 * 384
"""Pixels of the pictures of Edit-2509 and Edit-2511 for the encoder; the VAE sees them with :data:`EDIT_PIXELS`."""

SIDE_PIXELS: Final = 32
"""Sides of resized pictures are multiples of it."""

_PICTURE: Final = "<|vision_start|><|image_pad|><|vision_end|>"


def templated(prompt: str) -> str:
    """Return the text to tokenize for a prompt, which may have braces of its own."""
    return TEMPLATE.replace("{}", prompt, 1)


def edit_templated(prompt: str, pictures: int = 1, *, is_numbered: bool = True) -> str:
    """Return the text of a prompt with pictures for the encoder's processor.

    ``is_numbered`` names them "Picture 1: " and so on, as Edit-2509 and Edit-2511 have it. Edit has one without.
    """
    named = [f"Picture {number}: {_PICTURE}" if is_numbered else _PICTURE for number in range(1, pictures + 1)]
    return EDIT_TEMPLATE.replace("{}", "".join(named) + prompt, 1)


def condition_size(width: int, height: int, pixels: int = EDIT_PLUS_PIXELS) -> tuple[int, int]:
    """Return the width and height to which the pipelines resize a picture, of about so many pixels."""
    wide = math.sqrt(pixels * (width / height))
    high = wide / (width / height)
    return round(wide / SIDE_PIXELS) * SIDE_PIXELS, round(high / SIDE_PIXELS) * SIDE_PIXELS


def without_template(states: torch.Tensor, tokens: int = TEMPLATE_TOKENS) -> torch.Tensor:
    """Return the embeddings of a prompt, (batch, tokens of the prompt, channels), from the states of its whole text."""
    return states[:, tokens:]
