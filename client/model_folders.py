"""Find the files of a model that diffusers or transformers has saved: in a folder, by an index, or beside one file.

| given | read |
|---|---|
| a folder with ``config.json`` | the weights that ``from_pretrained`` loads, one file or shards with an index |
| ``NAME.safetensors.index.json`` | the shards that it names, and ``config.json`` beside it, if there is one |
| ``diffusion_pytorch_model.safetensors``, ``model.safetensors`` | the file, and a ``config.json`` beside it |
| any other file, also GGUF | the file alone |

Nothing outside the folder is read, but symbolic links are followed, as the cache of the Hugging Face Hub needs it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xditd.client.model_json import describe_config, read_weight_map
from xditd.ipc import limits
from xditd.ipc.addresses import expand_home
from xditd.ipc.errors import BadCheckpoint, BadRequest, RequestError
from xditd.ipc.file_kinds import folder_kind, shard_of
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import ComponentKind, ModuleDescription

logger = logging.getLogger(__name__)

CONFIG: Final = "config.json"
_INDEX_END: Final = re.compile(r"\.safetensors\.index(?:\.[A-Za-z0-9_-]+)?\.json$")
_WEIGHTS: Final = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>[A-Za-z0-9_-]+))?\.safetensors(?P<index>\.index(?:\.(?P<index_variant>[A-Za-z0-9_-]+))?\.json)?"
)
"""Names that diffusers and transformers give to weights and indexes. Both have put the variant of an index at two
places."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model.

    ``index`` is the path of the index, and ``weight_map`` what it says: the name of the shard of each tensor.
    ``description`` is the class and the configuration; ``None`` without a ``config.json``.
    """

    paths: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None
    description: ModuleDescription | None = None


def find_model(
    path: str,
    *,
    variant: str | None = None,
    has_class: bool = True,
    as_class: bool = False,
    kind: ComponentKind | None = None,
) -> ModelFiles:
    """Find the files of a model. ``variant`` selects one of several in a folder, such as ``fp16``.

    Without ``has_class``, no configuration is read. With ``as_class``, the model runs as its class in any case;
    otherwise a family may run it, and with a ``kind`` nothing else does.

    Raises:
        BadCheckpoint: files are missing, or there are several; or an index or a configuration is invalid.
        BadRequest: a ``variant`` for what is no folder, or ``as_class`` without a ``config.json``.
        Unsupported: a configuration that names no class, or quantised weights.
    """
    where = Path(path)
    is_folder = os.path.isdir(path)  # an empty path is no folder; Path makes it the current one
    if variant is not None and not is_folder:
        raise BadRequest(f"{path}: variant {variant!r} selects one of the files of a folder, and this is none")
    if is_folder:
        if not os.path.isfile(where / CONFIG):
            raise BadCheckpoint(f"{path}: this is {folder_kind(path)}")
        weights = _weights_in(where, variant)
    else:
        weights = where
    if _INDEX_END.search(weights.name):
        weight_map = read_weight_map(str(weights))
        paths = _shards(weights, weight_map)
        index = str(weights)
    else:
        if shard := shard_of(str(weights)):
            raise BadCheckpoint(f"{path}: this is {shard}")
        weight_map, paths, index = None, (str(weights) if is_folder else path,), None
    config = weights.parent / CONFIG
    is_alone = not is_folder and index is None
    has_config = has_class and os.path.isfile(config) and (not is_alone or _WEIGHTS.fullmatch(weights.name) is not None)
    if as_class and weights.suffix == ".gguf":
        raise BadRequest(f"{path}: to run as its class, it needs the names of its class, which no GGUF file has")
    if as_class and not has_config:
        raise BadRequest(f"{path}: to run as its class, it needs the class's {CONFIG} beside it, and there is none")
    description = None
    if has_config:
        try:
            description = describe_config(str(config), allows_family=not as_class, allows_class=kind is None)
        except RequestError as error:
            if not is_alone or as_class:
                raise
            logger.info("lent without its class: %s", error)  # a family may know it by its tensors
    return ModelFiles(paths, index, weight_map, description)


def has_config(path: str) -> bool:
    """Return whether this is the folder of a model with its configuration."""
    return os.path.isfile(os.path.join(expand_home(path), CONFIG))


def has_variant(folder: str, variant: str) -> bool:
    """Return whether a folder has weights of a variant, whole or in shards, in any format."""
    try:
        return any(f".{variant}." in name or f".{variant}-" in name for name in os.listdir(folder))
    except OSError:  # whoever opens it says what is wrong with it
        return True


def label_of(path: str) -> str:
    """Return the label of a component that is lent by a path: the folder's name, or that of the file."""
    where = Path(path)
    if os.path.isdir(path):
        return where.resolve().name or "model"
    if _INDEX_END.search(where.name):
        return where.resolve().parent.name or "model"
    return where.stem


def _weights_in(folder: Path, variant: str | None) -> Path:
    """Return the one file or index in a folder that has this variant.

    Raises:
        BadCheckpoint: there is none, or several.
    """
    found: dict[Path, str] = {}
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise BadCheckpoint(f"{folder}: {error.strerror}") from error
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        # A dot in a shard's name does not begin a variant.
        if match is not None and shard_of(name) is None:
            found[folder / name] = match["variant"] or match["index_variant"] or ""
    if not found:
        raise BadCheckpoint(f"{folder}: this is {folder_kind(str(folder))}")
    chosen = [path for path, has in found.items() if variant is None or has == variant]
    if len(chosen) == 1:
        return chosen[0]
    variants = sorted({has for has in found.values() if has})
    names_found = listed(path.name for path in chosen or found)
    if not chosen:
        known = f"; its variants are {listed(variants)}" if variants else ", and none of them is a variant"
        raise BadCheckpoint(f"{folder}: no weights of variant {variant!r} among {names_found}{known}")
    remedy = f"name one by variant= ({listed(variants)}), or lend" if variants and variant is None else "lend"
    raise BadCheckpoint(f"{folder}: {len(chosen)} candidates, {names_found}: {remedy} the path of one of them")


def _shards(index: Path, weight_map: Mapping[str, str]) -> tuple[str, ...]:
    """Return the paths of an index's shards.

    Raises:
        BadCheckpoint: a shard that is no safetensors file beside the index, is missing, or there are too many.
    """
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise BadCheckpoint(
                f"{index}: it names the shard {name!r:.200}, but shards are files in the index's folder"
            )
        if not name.endswith(".safetensors"):
            raise BadCheckpoint(
                f"{index}: it names the shard {name!r:.200}, and only safetensors files are lent: convert it"
            )
    if len(names) > limits.MAX_BLOCKS:
        raise BadCheckpoint(f"{index}: it names {len(names)} shards; at most {limits.MAX_BLOCKS} can be lent")
    missing = [name for name in names if not os.path.exists(index.parent / name)]
    if missing:
        raise BadCheckpoint(
            f"{index}: {len(missing)} of its {len(names)} shards are not beside it: {listed(missing)}; "
            "download them again",
            names=missing,
        )
    return tuple(str(index.parent / name) for name in names)
