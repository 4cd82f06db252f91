"""Prepare the folder of a tokenizer or a processor to be lent: its files as they are, each by an open descriptor."""

from __future__ import annotations

import os
import time
from pathlib import Path

from xditd.client.lend_checks import check_given, path_of
from xditd.client.lending import Offer
from xditd.client.lent_memory import LentMemory
from xditd.ipc.errors import BadCheckpoint, BadRequest
from xditd.ipc.name_lists import SENTENCE_CHARS, listed
from xditd.ipc.tensors import ComponentKind, Manifest, TensorSpec
from xditd.ipc.tokenizer_files import PIECES, TOKENIZER_FILES, WHOLE, file_fault


def describe_tokenizer(source: str | os.PathLike[str], *, label: str | None = None) -> Offer:
    """Prepare a tokenizer's or a processor's folder to be lent. Files of other names in it are not lent.

    Symbolic links are followed, as the cache of the Hugging Face Hub needs it.

    Raises:
        BadCheckpoint: no folder, or one without files of a tokenizer; a file is empty, too large or not regular.
        StaleSource: a file changed while it was read.
    """
    started = time.perf_counter()
    if not isinstance(source, str | bytes | os.PathLike):
        raise BadRequest(f"source: {source!r:.100} is of type {type(source).__name__}; give the tokenizer's folder")
    check_given(label=label, device=None, generation=0, as_class=False)
    path = path_of(source)
    label = label or os.fsencode(Path(path).resolve().name or "tokenizer").decode("utf-8", "replace")
    if not os.path.isdir(path):
        raise BadCheckpoint(f"{path}: it is a file; give the folder of the tokenizer, with tokenizer_config.json")
    names = [name for name in TOKENIZER_FILES if os.path.lexists(os.path.join(path, name))]
    if WHOLE in names and PIECES in names:
        names.remove(PIECES)  # transformers reads it only without the other
    if not names:
        there = listed(sorted(os.listdir(path))) or "nothing"
        raise BadCheckpoint(f"{path}: it holds no file of a tokenizer, but {there}; give the folder of the tokenizer")
    memory = LentMemory()
    try:
        specs = [_describe_file(os.path.join(path, name), name, memory) for name in names]
        manifest = Manifest(
            kind=ComponentKind.TOKENIZER, label=label, blocks=tuple(memory.blocks), tensors=tuple(specs)
        )
        if faults := manifest.faults():
            raise BadCheckpoint(f"{path}: {listed(faults, joint='; ', chars=SENTENCE_CHARS)}", names=faults)
    except BaseException:
        memory.close()
        raise
    memory.notes.append(f"file tier: workers read {listed(names)}; nothing is read into this process")
    return Offer(manifest, memory.copied, {"describe": (time.perf_counter() - started) * 1e3}, memory)


def _describe_file(path: str, name: str, memory: LentMemory) -> TensorSpec:
    lent = memory.open_file(path)
    size_bytes = os.fstat(lent.fd).st_size
    fault = file_fault(name, size_bytes) if size_bytes else f"{name} is empty"
    if fault is not None:
        raise BadCheckpoint(f"{path}: {fault}")
    number = memory.block_number(("file", path), lent.block)
    return TensorSpec(name, "uint8", (size_bytes,), number, 0)
