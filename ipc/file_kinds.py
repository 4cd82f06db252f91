"""Describe a file that cannot be lent as it is, by its first bytes and its name, for error messages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from xditd.ipc import limits
from xditd.ipc.name_lists import listed

START_BYTES: Final = 4_096
"""How much of a file's start is read."""
LENGTH_BYTES: Final = 8
"""A safetensors file begins with the length of its header, of this size."""

INDEX: Final = "NAME.safetensors.index.json"
_SHARDS: Final = f"lend its index ({INDEX}), or the folder if it has a config.json; nothing is copied"
_MERGE: Final = "merge them (llama-gguf-split --merge), and lend the one file"
_DOWNLOAD_AGAIN: Final = "download it again"
_CONVERT: Final = "convert it to safetensors (load it where you trust it, then safetensors.torch.save_file)"
_KINDS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"GGUF", "a GGUF file, and here only safetensors files are read: weights in GGUF are lent by their path"),
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself: fetch it (git lfs pull)"),
    (
        b"PK\x03\x04",
        f"a pickle in a zip archive, as torch.save writes (.pt, .pth, .ckpt, .bin): {_CONVERT}",
    ),
    (b"\x93NUMPY", f"a NumPy array: {_CONVERT}"),
    (b"\x89HDF", f"an HDF5 file: {_CONVERT}"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"RIFF", "a picture, a sound or a film: lend a safetensors file"),
    (b"\x89PNG", "a picture: lend a safetensors file"),
    (b"\xff\xd8\xff", "a picture: lend a safetensors file"),
    (b"%PDF", f"a PDF document: {_DOWNLOAD_AGAIN}"),
)
_SHOWN_CHARS: Final = 60
_PICKLE: Final = re.compile(rb"\x80[\x02-\x05]")
_SHARD: Final = re.compile(r"-(\d{5})-of-(\d{5})(?:\.[A-Za-z0-9_]+)?\.[a-z]+$")


def kind_of(start: bytes, size_bytes: int) -> str | None:
    """Describe a file with these first bytes, and the remedy; ``None`` if it may be a safetensors file."""
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= limits.MAX_SAFETENSORS_HEADER_BYTES:
        return None
    if size_bytes == 0:
        return f"an empty file: {_DOWNLOAD_AGAIN}"
    if not start.strip(b"\0"):
        return f"a file that begins with zeros, such as an unfinished download: {_DOWNLOAD_AGAIN}"
    for mark, kind in _KINDS:
        if start.startswith(mark):
            return kind
    if _PICKLE.match(start):
        return f"a pickle, such as older torch.save wrote: {_CONVERT}"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text[:200].lower()
    if lower.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return f"a web page, such as a login or an error page, and not the file itself: {_DOWNLOAD_AGAIN}"
    if text.startswith(b"{"):
        if b'"weight_map"' in text:
            return f"the index of a checkpoint in several files under another name than {INDEX}: rename it"
        return "a JSON file, which holds no weights: lend its folder, or the safetensors file beside it"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it"
    said = _first_words(start)
    if said is not None:
        return f"a text file that begins {said!r}, such as the error message of a download: {_DOWNLOAD_AGAIN}"
    return None


def _first_words(start: bytes) -> str | None:
    """Return the first words of a text; ``None`` if it is not text, or so short that it may be a header's length."""
    if len(start) <= LENGTH_BYTES:
        return None
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < START_BYTES - 4:  # not a character that was cut at the end
            return None
        text = start[: error.start].decode("utf-8")
    if not all(letter.isprintable() or letter in "\t\r\n" for letter in text):
        return None
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN_CHARS else f"{words[: _SHOWN_CHARS - 3]}..."


def shard_of(path: str) -> str | None:
    """Describe a file whose name marks it as one shard of a checkpoint, and the remedy; ``None`` for other names."""
    found = _SHARD.search(path)
    if found is None or int(found[2]) < 2:
        return None
    remedy = _MERGE if path.endswith(".gguf") else _SHARDS
    return f"file {int(found[1])} of the {int(found[2])} that make this checkpoint: {remedy}"


def folder_kind(path: str) -> str:
    """Describe a folder that cannot be lent, and what of it can be lent."""
    try:
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        found = []
    names = [entry.name for entry in found]
    files = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if "model_index.json" in names:
        what = "a folder of a diffusers pipeline"
        components = [entry.name for entry in found if os.path.isfile(os.path.join(entry.path, "config.json"))]
        if components:
            return f"{what}: lend the folders of its components one at a time: {listed(components)}"
    elif "config.json" in names:
        what = "a folder of a model"
    else:
        what = "a folder without a config.json"
    indexes = [name for name in names if ".safetensors.index." in name]
    if indexes:
        return f"{what} with a checkpoint in several files: lend its index: {listed(indexes)}"
    if not files:
        others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        has = f", and it has {listed(others)}: {_CONVERT}" if others else ""
        joint = " and" if what.endswith("config.json") else ""
        return f"{what}{joint} without safetensors or GGUF files, which are all that can be lent{has}"
    if len(files) > 1 and all(shard_of(name) for name in files):
        if all(name.endswith(".gguf") for name in files):
            return f"{what} with a GGUF checkpoint in {len(files)} files: {_MERGE}"
        return f"{what} with a checkpoint in {len(files)} files, but without its index ({INDEX}): download that too"
    return f"{what}, and it is not known which of its files to lend: lend one of them: {listed(files)}"


def kind_of_file(path: str) -> str | None:
    """Describe a file or folder that cannot be lent; ``None`` if it may be lent, or cannot be opened."""
    if Path(path).is_dir():
        return folder_kind(path)
    try:
        with open(path, "rb") as file:
            start = file.read(START_BYTES)
            size_bytes = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    return kind_of(start, size_bytes) or shard_of(path)
