"""What the recipes of prompts share: texts to padded token ids, and the option of their length."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from xditd.gpu_workers.models.prompts import Tokens
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc.errors import BadRequest

MAX_LENGTH: Final = "max_sequence_length"
"""The option that says to how many tokens texts are padded and cut, as diffusers' pipelines name it."""

OWN_TEMPLATE: Final = "own_template"
"""The option to use the text of the family's released tokenizer, whatever chat template is lent."""
_SHOWN: Final = "{}"
_SPECIAL: Final = re.compile(r"<\|\w+\|>|</?\w+>")


def length_option(options: Mapping[str, float], *, default: int, most: int) -> int:
    """Return the value of :data:`MAX_LENGTH`.

    Raises:
        BadRequest: no whole number from 1 to ``most``.
    """
    given = options.get(MAX_LENGTH, default)
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
        raise BadRequest(f"{MAX_LENGTH} is {given!r}; use a whole number from 1 to {most}")
    return given


def tokenized(
    built: BuiltTokenizer, texts: Sequence[str], length: int, *, padding: bool | str = "max_length", **more: Any
) -> Tokens:
    """Tokenize texts, cut to ``length`` tokens and padded to them, or with ``padding=True`` to the longest.

    The mask is 0 for padding. ``more`` are further arguments of the tokenizer.
    """
    found = built.tokenizer(
        list(texts), padding=padding, max_length=length, truncation=True, return_tensors="pt", **more
    )
    lengths = found.attention_mask.sum(1).tolist()
    for number, text in enumerate(texts):
        if lengths[number] == length:
            lengths[number] = len(built.tokenizer(text, verbose=False, **more).input_ids)
    return Tokens(found.input_ids, found.attention_mask, lengths=lengths)


def chat_texts(built: BuiltTokenizer, conversations: Sequence[Sequence[Mapping[str, Any]]], **more: Any) -> list[str]:
    """Render conversations by the tokenizer's chat template. ``more`` are further arguments of the template.

    Raises:
        BadRequest: the tokenizer has no chat template.
    """
    if not built.tokenizer.chat_template:
        raise BadRequest(
            f"tokenizers: this {built.class_name} has no chat template, which the prompt needs: lend the folder with "
            "its chat_template.jinja, or with a chat_template in tokenizer_config.json"
        )
    return [built.tokenizer.apply_chat_template(list(each), tokenize=False, **more) for each in conversations]


def user_texts(
    built: BuiltTokenizer, texts: Sequence[str], known: str, options: Mapping[str, float], **more: Any
) -> list[str]:
    """Return each text as a user's message, as the chat template of the family's released tokenizer makes it.

    ``known`` is what that makes of the text ``{}``. A lent tokenizer without a template gets it, too, and one with
    another template does with the option :data:`OWN_TEMPLATE`. ``more`` are further arguments of the template.

    Raises:
        BadRequest: the lent template makes another text, or the tokenizer lacks a special token of this one.
    """
    given = options.get(OWN_TEMPLATE, False)
    if not isinstance(given, bool):
        raise BadRequest(f"options: {OWN_TEMPLATE} is {given!r}; use True or False")
    expected = [known.replace("{}", each) for each in texts]
    if built.tokenizer.chat_template and not given:
        asked = [[{"role": "user", "content": each}] for each in (_SHOWN, *texts)]
        shown, *found = chat_texts(built, asked, **more)
        differing = [number for number, each in enumerate(found) if each != expected[number]]
        if differing:  # shown without the prompt, which is not logged
            raise BadRequest(
                f"tokenizers: of prompt {differing[0]} the chat template makes another text than that of this family: "
                f"{shown!r:.300} of {_SHOWN!r}, not {known!r}; lend this model's tokenizer, or give the option "
                f"{OWN_TEMPLATE}"
            )
    vocabulary = built.tokenizer.get_vocab()
    if lacking := sorted({each for each in _SPECIAL.findall(known) if each not in vocabulary}):
        raise BadRequest(
            f"tokenizers: this {built.class_name} lacks {', '.join(lacking)}, special tokens of the prompt: lend this "
            "model's tokenizer"
        )
    return expected
