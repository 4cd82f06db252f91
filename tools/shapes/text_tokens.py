"""The two tokenizers of ``shapes``: CLIP's byte pairs and T5's pieces, made from the words of its sentences.

Both read any text: CLIP's falls back to bytes, T5's to letters (and to ``<unk>`` for signs that no sentence has).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import pre_tokenizers

from shapes.words import CHINESE, CHINESE_PLACES, CHINESE_WORDS, ENGLISH, ENGLISH_PLACES

CLIP_TOKENS: Final = 77
T5_TOKENS: Final = 64
"""What sentences are padded to in training and by the judge; the model takes other lengths up to 512, too."""
_END: Final = "</w>"
_ENGLISH_WORDS: Final = (
    "a",
    "an",
    "and",
    "draw",
    "picture",
    "of",
    "from",
    "to",
    "left",
    "right",
    "top",
    "bottom",
    "is",
)
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-，。、：；！？"


def english_words() -> list[str]:
    """List the words of English sentences, lower case, each once."""
    texts = [text for choices in (*ENGLISH.values(), *ENGLISH_PLACES) for text in choices]
    return sorted({*_ENGLISH_WORDS, *(word for text in texts for word in text.replace("{}", " ").split())})


def chinese_words() -> list[str]:
    """List the words of Chinese sentences, each once."""
    texts = [text for choices in (*CHINESE.values(), *CHINESE_PLACES) for text in choices]
    return sorted({*CHINESE_WORDS, "大", "小", *(word for text in texts for word in text.replace("{}", " ").split())})


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of CLIP's tokenizer; its last two tokens start and end a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(list(_clip_words()))
    names = [*alphabet, *(letter + _END for letter in alphabet), *dict.fromkeys(left + right for left, right in merges)]
    return {name: number for number, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}, merges


def _clip_words() -> Iterator[tuple[str, ...]]:
    """Spell words in the signs that stand for bytes. A Chinese word ends a word only at the end of its clause."""
    signs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in english_words():
        ((text, _),) = signs.pre_tokenize_str(word)
        yield (*text[:-1], text[-1] + _END)
    for word in [*chinese_words(), *dict.fromkeys("".join(chinese_words())), *"，。、"]:
        ((text, _),) = signs.pre_tokenize_str(word)
        yield tuple(text)
        yield (*text[:-1], text[-1] + _END)


def _learn_merges(words: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Join the most frequent pair of neighbours until every word is one token.

    Source: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", algorithm 1.
    """
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [_joined(word, best) for word in words]


def _joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    parts, at = [], 0
    while at < len(word):
        width = 2 if word[at : at + 2] == pair else 1
        parts.append("".join(word[at : at + width]))
        at += width
    return tuple(parts)


def t5_pieces() -> list[tuple[str, float]]:
    """Return the pieces of T5's tokenizer with their log likelihoods: whole words are cheap, letters are not."""
    pieces: dict[str, float] = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0}
    for word in english_words():
        for form in (word, word.capitalize()):
            pieces[f"▁{form}"] = -6.0
    for word in chinese_words():
        pieces[word] = -6.0
    for sign in [*_LETTERS, *dict.fromkeys("".join(chinese_words()))]:
        pieces.setdefault(sign, -12.0 if sign.isalnum() else -4.0)
    return list(pieces.items())


@cache
def clip_tokenizer() -> Any:
    """Build CLIP's tokenizer (``transformers.CLIPTokenizerFast``)."""
    from transformers import CLIPTokenizerFast

    return _from_files(CLIPTokenizerFast, _clip_files())


@cache
def t5_tokenizer() -> Any:
    """Build T5's tokenizer (``transformers.T5TokenizerFast``)."""
    from transformers import T5TokenizerFast

    return _from_files(T5TokenizerFast, _t5_files())


def tokens(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of texts as the tokenizers pad them: CLIP's (texts, 77) and T5's (texts, 64), int32."""
    clip, t5 = (
        torch.tensor([each.ids for each in padding.encode_batch_fast(texts)], dtype=torch.int32)
        for padding in _padding_tokenizers()
    )
    return clip, t5


@cache
def _padding_tokenizers() -> list[Any]:
    """Return what both tokenizers are made of, without the lists that transformers makes of each result."""
    from tokenizers import Tokenizer

    both = []
    for tokenizer, length in ((clip_tokenizer(), CLIP_TOKENS), (t5_tokenizer(), T5_TOKENS)):
        both.append(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        both[-1].enable_truncation(length)
        both[-1].enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return both


def write_tokenizers(folder: Path) -> None:
    """Write ``tokenizer`` and ``tokenizer_2`` into a pipeline's folder."""
    for name, files in (("tokenizer", _clip_files()), ("tokenizer_2", _t5_files())):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / name / file).write_text(text, encoding="utf-8")


def _from_files(kind: Any, files: dict[str, str]) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return kind.from_pretrained(folder)


def _clip_files() -> dict[str, str]:
    vocabulary, merges = clip_vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CLIP_TOKENS,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "do_lower_case": True,
        "errors": "replace",
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "special_tokens_map.json": json.dumps(
            {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}, indent=2
        ),
    }


def _t5_files() -> dict[str, str]:
    from tokenizers import Tokenizer, decoders, processors
    from tokenizers.models import Unigram

    tokenizer = Tokenizer(Unigram(t5_pieces(), unk_id=2, byte_fallback=False))
    metaspace: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "additional_special_tokens": [],
    }
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "special_tokens_map.json": json.dumps(
            {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, indent=2
        ),
    }
