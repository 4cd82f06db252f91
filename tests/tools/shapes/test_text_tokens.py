"""The tokenizers of shapes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from shapes.text_tokens import CLIP_TOKENS, T5_TOKENS, chinese_words, clip_tokenizer, t5_tokenizer, write_tokenizers
from shapes.words import sample_request
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    rng = Random(1)
    return [sample_request(rng).text for _ in range(300)]


def test_sentences_fit_and_have_no_unknown_signs(sentences: list[str]) -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    assert max(len(each) for each in clip(sentences).input_ids) <= CLIP_TOKENS
    assert max(len(each) for each in t5(sentences).input_ids) <= T5_TOKENS
    assert all(t5.unk_token_id not in each for each in t5(sentences).input_ids)


def test_sentences_come_back_from_their_tokens(sentences: list[str]) -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for text in sentences:
        assert t5.decode(t5(text).input_ids, skip_special_tokens=True) == text
        found = clip.decode(clip(text).input_ids, skip_special_tokens=True)
        assert found.replace(" ", "") == text.lower().replace(" ", "")


def test_chinese_words_are_single_tokens_inside_a_clause() -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    text = "一个红色的三角形在一个蓝色圆环的左边"
    words = ["一个", "红色", "的", "三角形", "在", "一个", "蓝色", "圆环", "的", "左边"]
    assert t5.convert_ids_to_tokens(t5(text, add_special_tokens=False).input_ids) == ["▁", *words]
    assert [clip.decode([each]).strip() for each in clip(text, add_special_tokens=False).input_ids] == words
    assert set(words) <= set(chinese_words())


def test_texts_of_other_words_are_read_too() -> None:
    text = "Draw 7 wonderful cats!"
    assert t5_tokenizer().decode(t5_tokenizer()(text).input_ids, skip_special_tokens=True) == text
    assert "龍" in clip_tokenizer().decode(clip_tokenizer()("龍").input_ids)


def test_ids_are_those_that_the_workers_expect() -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    assert (clip.bos_token_id, clip.eos_token_id) == (len(clip) - 2, len(clip) - 1)
    assert clip.pad_token_id == clip.eos_token_id
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)


def test_written_tokenizers_are_the_same(tmp_path: Path, sentences: list[str]) -> None:
    write_tokenizers(tmp_path)
    for name, own in (("tokenizer", clip_tokenizer()), ("tokenizer_2", t5_tokenizer())):
        assert AutoTokenizer.from_pretrained(tmp_path / name)(sentences).input_ids == own(sentences).input_ids
