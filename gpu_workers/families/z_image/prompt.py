"""Prompts of Z-Image as diffusers' ``ZImagePipeline.encode_prompt`` encodes them: Qwen3's states before the last layer.

Each text is a user's message of the chat template, with thinking on. Padding is left out of the result.

Source: diffusers, ``pipeline_z_image.py``; tests compare the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from xditd.gpu_workers.families.z_image.config import ZImageConfig
from xditd.gpu_workers.models.prompts import Conditioning, PromptEncoders, PromptInputs, Tokens
from xditd.gpu_workers.models.token_texts import MAX_LENGTH, OWN_TEMPLATE, length_option, tokenized, user_texts
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc import limits
from xditd.ipc.facts import PromptFacts

ENCODER: Final = "text_encoder"
TOKENIZER: Final = "tokenizer"
_LENGTH: Final = 512
_CHAT: Final = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

FACTS: Final = PromptFacts(
    encoders={ENCODER: ("qwen3",)},
    tokenizers={TOKENIZER: ("Qwen2Tokenizer",)},
    takes_negative=True,
    default_negative="",
    options=(MAX_LENGTH, OWN_TEMPLATE),
)


class ZImagePrompt:
    """See :class:`~xditd.gpu_workers.models.prompts.PromptRecipe`."""

    def facts(self, config: ZImageConfig) -> PromptFacts:
        return FACTS

    def tokenize(
        self, config: ZImageConfig, inputs: PromptInputs, tokenizers: Mapping[str, BuiltTokenizer]
    ) -> Mapping[str, Tokens]:
        length = length_option(inputs.options, default=_LENGTH, most=limits.MAX_TEXT_TOKENS)
        built = tokenizers[TOKENIZER]
        texts = user_texts(built, inputs.texts, _CHAT, inputs.options, add_generation_prompt=True, enable_thinking=True)
        return {ENCODER: tokenized(built, texts, length)}

    def encode(self, config: ZImageConfig, tokens: Mapping[str, Tokens], encoders: PromptEncoders) -> Conditioning:
        given = tokens[ENCODER]
        assert given.mask is not None
        states, _ = encoders.states(ENCODER, given, layers=(encoders.layers(ENCODER) - 1,))
        kept = given.mask.bool().to(states.device)
        return {"prompt_embeds": [row[mask] for row, mask in zip(states, kept, strict=True)]}
