"""The files of tokenizers and processors that are lent: a closed list of names, with bounds."""

from __future__ import annotations

from typing import Final

from xditd.ipc import limits

CONFIG: Final = "tokenizer_config.json"
WHOLE: Final = "tokenizer.json"
PIECES: Final = "spiece.model"
"""A model of SentencePiece, which transformers converts if there is no :data:`WHOLE`."""

TOKENIZER_FILES: Final = (
    WHOLE,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    PIECES,
)
"""Names of the files that ``from_pretrained`` of transformers' tokenizers and processors reads; all others are code, or
belong to other classes."""


def file_fault(name: str, size_bytes: int) -> str | None:
    """Say what is wrong with a file of a tokenizer, by its name and size."""
    if name not in TOKENIZER_FILES:
        return f"{name!r:.200} is no file of a tokenizer: those are {', '.join(TOKENIZER_FILES)}"
    if size_bytes > limits.MAX_TOKENIZER_FILE_BYTES:
        return f"{name} has {size_bytes} bytes: at most {limits.MAX_TOKENIZER_FILE_BYTES} are read"
    return None
