"""Read the header of a file that is to be lent, safetensors or GGUF, which its first bytes tell apart."""

from __future__ import annotations

import os
import re
from typing import Final

from xditd.ipc.errors import Unsupported
from xditd.ipc.transports import gguf_header, gguf_pairs, safetensors_header
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.stored_tensors import Header

_LLAMA_CPP: Final = re.compile(r"^token_embd\.weight$|^(?:[a-z]+\.)?blk\.\d+\.")
"""Names that llama.cpp gives to tensors; converters of diffusion models keep those of the original checkpoint."""


def read_header(lent: LentFile) -> Header:
    """Read and check the header of an open file.

    Raises:
        BadCheckpoint: neither of the two formats, or a malformed header.
        Unsupported: a GGUF file of a language model or a text encoder.
    """
    if os.pread(lent.fd, len(gguf_header.MAGIC), 0) != gguf_header.MAGIC:
        return safetensors_header.read_header(lent.fd, lent.path)
    header = gguf_header.read_header(lent.fd, lent.path)
    named = [stored.name for stored in header.tensors if _LLAMA_CPP.match(stored.name)]
    if named:
        architecture = header.metadata.get(gguf_pairs.ARCHITECTURE)
        raise Unsupported(
            f"{lent.path}: this is a GGUF file of a language model or a text encoder (general.architecture is "
            f"{architecture!r}), in llama.cpp's names, such as {named[0]}: lend a safetensors file of it",
            names=named,
        )
    return header
