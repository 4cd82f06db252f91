"""Read the header of a file that is to be lent, safetensors or GGUF, which its first bytes tell apart."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Final

import msgspec

from xditd.client.llama_cpp_names import ENCODER, transformers_name
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.name_lists import listed
from xditd.ipc.transports import gguf_header, gguf_pairs, safetensors_header
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.stored_tensors import Header

_LLAMA_CPP: Final = re.compile(r"^token_embd\.weight$|^(?:[a-z]+\.)?blk\.\d+\.")
"""Names that llama.cpp gives to tensors; converters of diffusion models keep those of the original checkpoint."""


def read_header(lent: LentFile) -> Header:
    """Read and check the header of an open file. Tensors of an encoder in llama.cpp's names get those of transformers.

    Raises:
        BadCheckpoint: neither of the two formats, or a malformed header; or the file cannot be read.
        Unsupported: a GGUF file of a language model.
    """
    try:
        if lent.read(len(gguf_header.MAGIC), 0) != gguf_header.MAGIC:
            return safetensors_header.read_header(lent.fd, lent.path)
        header = gguf_header.read_header(lent.fd, lent.path)
    except OSError as error:
        raise lent.unreadable(error) from error
    named = [stored.name for stored in header.tensors if _LLAMA_CPP.match(stored.name)]
    if any(map(ENCODER.match, named)):
        return _renamed(header, lent.path)
    if named:
        architecture = header.metadata.get(gguf_pairs.ARCHITECTURE)
        raise Unsupported(
            f"{lent.path}: this is a GGUF file of a language model (general.architecture is "
            f"{architecture!r}), in llama.cpp's names, such as {named[0]}: lend a safetensors file of it",
            names=named,
        )
    return header


def _renamed(header: Header, path: str) -> Header:
    """Return the header of an encoder with transformers' names."""
    names = {stored.name: transformers_name(stored.name) for stored in header.tensors}
    twice = sorted(name for name, count in Counter(names.values()).items() if count > 1)
    if twice:
        raise BadCheckpoint(f"{path}: several tensors are {listed(twice)}: get the file again", names=twice)
    tensors = tuple(replace(stored, name=names[stored.name]) for stored in header.tensors)
    packed = tuple(msgspec.structs.replace(each, weight=names[each.weight]) for each in header.packed)
    return replace(header, tensors=tensors, packed=packed)
