"""Read the JSON files beside weights: the ``config.json`` of a model and the index of a checkpoint in several files.

They come from the internet, so their size and their form are checked.
"""

from __future__ import annotations

import json
import os
import re
import stat
from typing import Any, Final

from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.tensors import ModuleDescription

MAX_INDEX_BYTES: Final = 16 * 2**20
"""An index of 16,384 tensors takes 2 MiB."""

_MAX_CONFIG_BYTES: Final = 4 * limits.MAX_TEXT_CHARS
_CLASS_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_LEND_MODULE: Final = "load it with from_pretrained, and lend the module"


def describe_config(path: str, *, allows_family: bool, allows_class: bool = True) -> ModuleDescription:
    """Return the class and the configuration of a ``config.json`` of diffusers or transformers.

    Raises:
        BadCheckpoint: it cannot be read, or is no JSON of a configuration.
        Unsupported: it names no class, or says that the weights are quantised. Without ``allows_class`` that is of no
            account: a family knows packed weights by their tensors.
    """
    config = read_json(path, _MAX_CONFIG_BYTES)
    if not allows_class:
        config.pop("quantization_config", None)
    return description_of(config, path, allows_family=allows_family)


def description_of(config: dict[str, Any], path: str, *, allows_family: bool) -> ModuleDescription:
    """Return the class and the configuration of what a ``config.json`` has; ``path`` is for messages.

    Raises:
        BadCheckpoint: a value is none of JSON.
        Unsupported: as :func:`describe_config`.
    """
    if config.get("quantization_config") is not None:
        raise Unsupported(
            f"{path}: it has a quantization_config, so the weights are packed: lend a bfloat16 or float16 checkpoint "
            "of the same model"
        )
    text = _text(config, path)
    return ModuleDescription(class_name=_class_of(config, path), config=text, allows_family=allows_family)


def read_weight_map(path: str) -> dict[str, str]:
    """Return the name of the shard of each tensor, as an index says.

    Raises:
        BadCheckpoint: it cannot be read, or is no index.
    """
    found = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise BadCheckpoint(f"{path}: no index of a checkpoint: it has no weight_map from tensors to names of files")
    if not 1 <= len(found) <= limits.MAX_TENSORS:
        raise BadCheckpoint(f"{path}: an index of {len(found)} tensors; 1 to {limits.MAX_TENSORS} can be lent")
    try:
        "".join((*found, *found.values())).encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
        raise BadCheckpoint(f"{path}: a name in its weight_map is not Unicode") from error
    return found


def _class_of(config: dict[str, Any], path: str) -> str:
    """Return the class of a configuration, as ``package:Class``."""
    if "_class_name" in config:
        package, name = "diffusers", config["_class_name"]
    else:
        named = config.get("architectures")
        if not isinstance(named, list) or len(named) != 1:
            raise Unsupported(
                f"{path}: it names no class (_class_name of diffusers, or one of architectures of transformers): "
                f"{_LEND_MODULE}"
            )
        package, name = "transformers", named[0]
    if not isinstance(name, str) or not _CLASS_NAME.fullmatch(name):
        raise Unsupported(f"{path}: {name!r:.200} is no class of {package}: {_LEND_MODULE}")
    return f"{package}:{name}"


def _text(config: dict[str, Any], path: str) -> str:
    try:
        text = json.dumps(config, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:  # 1e999 is read as infinity; a caller's values may be anything
        raise BadCheckpoint(f"{path}: {error}; a configuration has finite numbers") from error
    if len(text) > limits.MAX_TEXT_CHARS:
        raise BadCheckpoint(f"{path}: a configuration of {len(text)} characters; at most {limits.MAX_TEXT_CHARS}")
    return text


def read_json(path: str, most_bytes: int) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BadCheckpoint: it cannot be read, is larger than ``most_bytes``, too deep, or not a JSON object.
    """

    def refuse_constant(name: str) -> float:
        raise BadCheckpoint(f"{path}: it has the number {name}, which is not JSON")

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise BadCheckpoint(f"{path}: a name appears twice in it")
        return found

    text = _read(path, most_bytes)
    try:
        found = json.loads(text.decode("utf-8"), parse_constant=refuse_constant, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path}: it is not JSON: {error!s:.200}") from error
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{path}: it is a JSON {type(found).__name__}, not an object")
    return found


def _read(path: str, most_bytes: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
    except OSError as error:
        raise BadCheckpoint(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BadCheckpoint(f"{path!r}: {error}") from error
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise BadCheckpoint(f"{path}: not a regular file")
        if found.st_size > most_bytes:
            raise BadCheckpoint(f"{path}: {found.st_size} bytes; at most {most_bytes} are read")
        try:
            return file.read(most_bytes)
        except OSError as error:
            raise BadCheckpoint(f"{path}: {error.strerror}") from error
