"""The prompts of Qwen-Image as its text encoder takes them: templates, and how many of their tokens are left out.

Sources: diffusers, ``QwenImagePipeline`` (``prompt_template_encode``, ``prompt_template_encode_start_idx``).
"""

from __future__ import annotations

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


def templated(prompt: str) -> str:
    """Return the text to tokenize for a prompt, which may have braces of its own."""
    return TEMPLATE.replace("{}", prompt, 1)


def without_template(states: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of a prompt, (batch, tokens - 34, channels), from the states of its templated text."""
    return states[:, TEMPLATE_TOKENS:]
