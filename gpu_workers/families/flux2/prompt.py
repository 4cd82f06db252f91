"""Prompts of FLUX.2 as diffusers' pipelines encode them: states after three layers, one beside the other, with padding.

Those of dev are of Mistral Small 3, with a system message (``Flux2Pipeline``); those of klein are of Qwen3, without
thinking (``Flux2KleinPipeline``). The chat template of the tokenizer makes both.

Source: diffusers, ``pipeline_flux2.py`` and ``pipeline_flux2_klein.py``; tests compare the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from xditd.gpu_workers.families.flux2.config import Flux2Config
from xditd.gpu_workers.models.prompts import Conditioning, PromptEncoders, PromptInputs, Tokens
from xditd.gpu_workers.models.token_texts import (
    MAX_LENGTH,
    OWN_TEMPLATE,
    chat_texts,
    length_option,
    tokenized,
    user_texts,
)
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc.facts import PromptFacts

ENCODER: Final = "text_encoder"
TOKENIZER: Final = "tokenizer"
_LENGTH: Final = 512
_IMAGE: Final = "[IMG]"

DEV_FACTS: Final = PromptFacts(
    encoders={ENCODER: ("mistral3",)},
    tokenizers={TOKENIZER: ("PixtralProcessor", "PreTrainedTokenizerFast")},
    options=(MAX_LENGTH,),
)
_DEV_LAYERS: Final = (10, 20, 30)

KLEIN_FACTS: Final = PromptFacts(
    encoders={ENCODER: ("qwen3",)},
    tokenizers={TOKENIZER: ("Qwen2Tokenizer",)},
    takes_negative=True,
    default_negative="",
    options=(MAX_LENGTH, OWN_TEMPLATE),
)
_KLEIN_LAYERS: Final = (9, 18, 27)
_KLEIN_CHAT: Final = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class Flux2Prompt:
    """See :class:`~xditd.gpu_workers.models.prompts.PromptRecipe`."""

    def facts(self, config: Flux2Config) -> PromptFacts:
        return prompt_facts(config)

    def tokenize(
        self, config: Flux2Config, inputs: PromptInputs, tokenizers: Mapping[str, BuiltTokenizer]
    ) -> Mapping[str, Tokens]:
        length = length_option(inputs.options, default=_LENGTH, most=_LENGTH)
        built = tokenizers[TOKENIZER]
        if not config.has_guidance:
            given = {"add_generation_prompt": True, "enable_thinking": False}
            texts = user_texts(built, inputs.texts, _KLEIN_CHAT, inputs.options, **given)
            return {ENCODER: tokenized(built, texts, length)}
        texts = chat_texts(built, [_conversation(each) for each in inputs.texts], add_generation_prompt=False)
        return {ENCODER: tokenized(built, texts, length, add_special_tokens=_adds_specials(built, texts[0]))}

    def encode(self, config: Flux2Config, tokens: Mapping[str, Tokens], encoders: PromptEncoders) -> Conditioning:
        layers = _DEV_LAYERS if config.has_guidance else _KLEIN_LAYERS
        states, _ = encoders.states(ENCODER, tokens[ENCODER], layers=layers)
        return {"prompt_embeds": states}


def prompt_facts(config: Flux2Config) -> PromptFacts:
    """Return what prompts need: dev's model has a guidance embedding, klein's has none."""
    return DEV_FACTS if config.has_guidance else KLEIN_FACTS


def _conversation(text: str) -> list[dict[str, Any]]:
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]},
        {"role": "user", "content": [{"type": "text", "text": text.replace(_IMAGE, "")}]},
    ]


def _adds_specials(built: BuiltTokenizer, text: str) -> bool:
    """Return whether the tokenizer adds its special tokens to what a template has made.

    A tokenizer does not, and a processor does unless the first text begins with one.
    """
    is_processor = built.class_name == DEV_FACTS.tokenizers[TOKENIZER][0]
    begin = built.tokenizer.bos_token
    return is_processor and (begin is None or not text.startswith(begin))
