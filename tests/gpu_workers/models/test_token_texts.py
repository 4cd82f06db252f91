"""What prompt recipes share: chat templates that are not the family's are refused, without a word of the prompt."""

from __future__ import annotations

import pytest
import tokenizer_folders

from xditd.gpu_workers.models.token_texts import OWN_TEMPLATE, length_option, tokenized, user_texts
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc.errors import BadRequest

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def built() -> BuiltTokenizer:
    return BuiltTokenizer("Qwen2Tokenizer", tokenizer_folders.qwen2_tokenizer())


def texts(built: BuiltTokenizer, known: str = CHAT, **options: float) -> list[str]:
    return user_texts(built, ["a {} cat", ""], known, options, add_generation_prompt=True, enable_thinking=True)


def test_the_text_of_the_familys_template_is_taken(built: BuiltTokenizer) -> None:
    right = [CHAT.replace("{}", "a {} cat"), CHAT.replace("{}", "")]
    assert texts(built) == right
    built.tokenizer.chat_template = None
    assert texts(built) == right
    built.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert texts(built, own_template=True) == right


def test_another_template_is_refused_and_the_prompt_is_not_shown(built: BuiltTokenizer) -> None:
    built.tokenizer.chat_template = "system: be kind\n{{ messages[0]['content'] }}"
    with pytest.raises(BadRequest, match=r"of prompt 0 .* 'system: be kind\\n\{\}' of '\{\}'") as refused:
        texts(built)
    assert "cat" not in refused.value.detail
    with pytest.raises(BadRequest, match=f"{OWN_TEMPLATE} is 2; use True or False"):
        texts(built, own_template=2)


def test_a_tokenizer_without_the_special_tokens_is_refused(built: BuiltTokenizer) -> None:
    with pytest.raises(BadRequest, match=r"lacks <\|start_of_role\|>, special tokens of the prompt"):
        texts(built, known="<|start_of_role|>user{}", own_template=True)


@pytest.mark.parametrize("given", [0, 513, True, 2.5])
def test_lengths_are_whole_and_within_bounds(given: float) -> None:
    with pytest.raises(BadRequest, match=r"max_sequence_length is .*; use a whole number from 1 to 512"):
        length_option({"max_sequence_length": given}, default=512, most=512)


def test_texts_are_cut_and_padded(built: BuiltTokenizer) -> None:
    found = tokenized(built, ["a", "a cat sits " * 9], 8)
    assert found.token_ids.shape == (2, 8)
    assert found.mask is not None
    assert found.mask.sum(1).tolist() == [1, 8]
    assert tokenized(built, ["a", "b"], 8, padding=True).token_ids.shape == (2, 1)
