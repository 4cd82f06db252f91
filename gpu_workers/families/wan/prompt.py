"""Prompts of Wan as diffusers' ``WanPipeline.encode_prompt`` encodes them: UMT5's states, with zeros for padding.

Texts are cleaned by the pipeline's own function, which uses ``ftfy`` where it is installed, as in the pipeline.

Source: diffusers, ``pipeline_wan.py``; tests compare the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from xditd.gpu_workers.families.wan.config import WanConfig
from xditd.gpu_workers.models.prompts import Conditioning, PromptEncoders, PromptInputs, Tokens
from xditd.gpu_workers.models.token_texts import MAX_LENGTH, length_option, tokenized
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc import limits
from xditd.ipc.facts import PromptFacts

ENCODER: Final = "text_encoder"
TOKENIZER: Final = "tokenizer"
_LENGTH: Final = 512

FACTS: Final = PromptFacts(
    encoders={ENCODER: ("umt5",)},
    tokenizers={TOKENIZER: ("T5Tokenizer",)},
    takes_negative=True,
    default_negative="",
    options=(MAX_LENGTH,),
)


class WanPrompt:
    """See :class:`~xditd.gpu_workers.models.prompts.PromptRecipe`."""

    def facts(self, config: WanConfig) -> PromptFacts:
        return FACTS

    def tokenize(
        self, config: WanConfig, inputs: PromptInputs, tokenizers: Mapping[str, BuiltTokenizer]
    ) -> Mapping[str, Tokens]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        length = length_option(inputs.options, default=_LENGTH, most=limits.MAX_TEXT_TOKENS)
        return {ENCODER: tokenized(tokenizers[TOKENIZER], [prompt_clean(each) for each in inputs.texts], length)}

    def encode(self, config: WanConfig, tokens: Mapping[str, Tokens], encoders: PromptEncoders) -> Conditioning:
        states, _ = encoders.states(ENCODER, tokens[ENCODER])  # those of padding are zero
        return {"prompt_embeds": states}
