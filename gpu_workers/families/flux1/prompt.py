"""Prompts of FLUX.1 as diffusers' ``FluxPipeline.encode_prompt`` encodes them: CLIP-L's pooled state, and T5's states.

CLIP reads the first 77 tokens, T5 as many as ``max_sequence_length`` says, with padding, which T5 is not told of.

Source: diffusers, ``pipeline_flux.py``; tests compare the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from xditd.gpu_workers.families.flux1.config import Flux1Config
from xditd.gpu_workers.models.prompts import Conditioning, PromptEncoders, PromptInputs, Tokens
from xditd.gpu_workers.models.token_texts import MAX_LENGTH, length_option, tokenized
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc.facts import PromptFacts

CLIP: Final = "text_encoder"
T5: Final = "text_encoder_2"

FACTS: Final = PromptFacts(
    encoders={CLIP: ("clip_l",), T5: ("t5",)},
    tokenizers={"tokenizer": ("CLIPTokenizer",), "tokenizer_2": ("T5Tokenizer",)},
    takes_second=True,
    options=(MAX_LENGTH,),
)
_LENGTH: Final = 512
_CLIP_LENGTH: Final = 77
_CLIP_MOST: Final = 1024


class Flux1Prompt:
    """See :class:`~xditd.gpu_workers.models.prompts.PromptRecipe`."""

    def facts(self, config: Flux1Config) -> PromptFacts:
        return FACTS

    def tokenize(
        self, config: Flux1Config, inputs: PromptInputs, tokenizers: Mapping[str, BuiltTokenizer]
    ) -> Mapping[str, Tokens]:
        length = length_option(inputs.options, default=_LENGTH, most=_LENGTH)
        # The pipeline takes what the tokenizer says. ComfyUI's says 8192, which no CLIP can read.
        said = tokenizers["tokenizer"].tokenizer.model_max_length
        of_clip = said if said <= _CLIP_MOST else _CLIP_LENGTH
        of_both = {
            CLIP: tokenized(tokenizers["tokenizer"], inputs.texts, of_clip),
            T5: tokenized(tokenizers["tokenizer_2"], inputs.second or inputs.texts, length),
        }
        return {role: replace(found, mask=None) for role, found in of_both.items()}

    def encode(self, config: Flux1Config, tokens: Mapping[str, Tokens], encoders: PromptEncoders) -> Conditioning:
        _, pooled = encoders.states(CLIP, tokens[CLIP], pooled=True)
        assert pooled is not None
        embeds, _ = encoders.states(T5, tokens[T5])
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
