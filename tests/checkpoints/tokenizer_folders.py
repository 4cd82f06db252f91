"""Small tokenizers of transformers' own classes, made of a few texts, in folders as ``save_pretrained`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXTS = (
    "a cat sits on a mat, in the style of an old painting",
    "a dog runs over the meadow (near the river:1.2) at dawn, highly detailed",
    "two astronauts play chess on the moon; one of them wins",
    "ein Haus am See, Öl auf Leinwand, größer als erwartet",
    "一只猫坐在垫子上,水墨画风格",
)

PROMPTS = (
    "",
    " ",
    "a cat",
    "A CAT!!",
    "a (cat:1.2) and [a dog]",
    "((masterpiece)), best quality, <lora:x:0.8>",
    "word " * 600,
    "x" * 900,
    "🐈‍⬛ a black cat 🎨🖼️",
    "一只猫坐在垫子上",
    "猫 cat 猫",
    "ein größeres Haus am See",
    "line one\nline two\r\n\tline three",
    "   spaces   around   ",
    "don't can't it's",
    "<|endoftext|> </s> <pad> <|im_end|> [IMG]",
    "&amp;amp; &lt;b&gt; caf\u00e9 cafe\u0301",
    "{braces} {} %s \\n",
    "\u200bzero\u200bwidth\u202e",
    "3.14159 + 2 = 5.14159",
)
"""Texts that tokenizers treat differently: empty, long, emoji, Chinese, weights, their own special tokens."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""Qwen's chat template, but for tools."""


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocab, merges = _byte_pairs(end="</w>", specials=("<|startoftext|>", "<|endoftext|>"))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer() -> Any:
    """T5's or UMT5's, whose class is the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=300, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    )
    pieces = sorted(tuple(each) for each in json.loads(trained.to_str())["model"]["vocab"] if each[0] != "<unk>")
    first = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*first, *pieces], extra_ids=10, model_max_length=512)


def qwen2_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    vocab, merges = _byte_pairs()
    found = Qwen2Tokenizer(vocab=vocab, merges=merges)
    specials = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    found.add_special_tokens({"additional_special_tokens": specials})
    found.chat_template = CHATML
    return found


LISTS = (
    "<s>{% for message in messages %}{% if message['role'] == 'system' %}"
    "[SYSTEM_PROMPT]{{ message['content'][0]['text'] }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}"
)
"""Mistral's chat template, for messages with a list of one text."""


def mistral_tokenizer() -> Any:
    """A tokenizer of Mistral's kind: of bytes, with a token that begins every text, and padding on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ("<pad>", "<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]")
    vocab, merges = _byte_pairs(specials=specials)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        additional_special_tokens=list(specials[3:]),
    )  # fmt: skip
    found.chat_template = LISTS
    return found


def save(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def _byte_pairs(end: str = "", specials: tuple[str, ...] = ()) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of a byte-level BPE, special tokens last."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    suffix = {"end_of_word_suffix": end} if end else {}
    trained = Tokenizer(models.BPE(**suffix))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=alphabet, **suffix),
    )
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    vocab: dict[str, int] = {}
    for piece in [*alphabet, *([each + end for each in alphabet] if end else []), *pieces, *specials]:
        vocab.setdefault(piece, len(vocab))
    merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
    return vocab, merges
