"""Prompts of Wan as diffusers' ``WanPipeline.encode_prompt`` encodes them: UMT5's states, with zeros for padding.

Texts are cleaned by the pipeline's own function, which uses ``ftfy`` where it is installed, as in the pipeline. Those
of ``WanImageToVideoPipeline`` and ``WanVACEPipeline`` do not run without it.

Source: diffusers, ``pipeline_wan.py``, ``pipeline_wan_i2v.py`` and ``pipeline_wan_vace.py``; tests compare the bits.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Final

from xditd.gpu_workers.families.wan.config import WanConfig, WanVaceConfig
from xditd.gpu_workers.models.prompts import Conditioning, PromptEncoders, PromptInputs, Tokens
from xditd.gpu_workers.models.token_texts import MAX_LENGTH, length_option, tokenized
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc import limits
from xditd.ipc.errors import Unsupported
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
        from diffusers.pipelines.wan.pipeline_wan import is_ftfy_available, prompt_clean

        length = length_option(inputs.options, default=_LENGTH, most=limits.MAX_TEXT_TOKENS)
        texts = [prompt_clean(each) for each in inputs.texts]
        if (config.has_image_latents or isinstance(config, WanVaceConfig)) and not is_ftfy_available():
            _check_without_ftfy(texts)
        return {ENCODER: tokenized(tokenizers[TOKENIZER], texts, length)}

    def encode(self, config: WanConfig, tokens: Mapping[str, Tokens], encoders: PromptEncoders) -> Conditioning:
        states, _ = encoders.states(ENCODER, tokens[ENCODER])  # those of padding are zero
        return {"prompt_embeds": states}


def _check_without_ftfy(texts: Sequence[str]) -> None:
    """Refuse cleaned texts that ``ftfy`` may change: it has other quotation marks, widths, accents and entities.

    Raises:
        Unsupported: one has anything but plain ASCII; without the text, which is not logged.
    """
    for number, text in enumerate(texts):
        if not (text.isascii() and text.isprintable() and html.unescape(text) == text):
            raise Unsupported(
                f"prompt or negative prompt {number}: diffusers cleans texts of this model by ftfy, which may change "
                "what is not plain ASCII, and the workers lack it: pip install ftfy where xditd is installed, and "
                "restart the daemon"
            )
