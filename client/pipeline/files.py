"""Find the parts of a pipeline in single files: one for each part, or several in an all-in-one checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from xditd.client.model_folders import has_config
from xditd.client.pipeline.folders import INDEX, is_pipeline, read_folder, read_scheduler
from xditd.client.pipeline.sources import (
    ENCODERS,
    TRANSFORMER,
    VAE,
    Part,
    Source,
    kind_of,
)
from xditd.ipc.addresses import check_is_there, user_path
from xditd.ipc.errors import BadCheckpoint, BadRequest
from xditd.ipc.tensor_names import by_prefix
from xditd.ipc.tensors import ComponentKind

PathLike = str | os.PathLike[str]
Paths = Sequence[PathLike] | Mapping[str, PathLike]

_ENCODER_MARKS: Final = ("text_encoder", "cond_stage_model", "clip_l", "t5xxl", "umt5xxl", "conditioner")
_VAE_MARKS: Final = ("first_stage_model", "vae")


def find_source(
    source: PathLike | None,
    *,
    parts: Mapping[str, PathLike | None],
    text_encoders: Paths,
    tokenizers: PathLike | Mapping[str, PathLike] | None,
    scheduler: PathLike | Mapping[str, Any] | None,
    variant: str | None,
    name: str | None,
) -> Source:
    """Find the parts of a pipeline. ``parts`` are paths by role; ``source`` is a folder or an all-in-one file.

    Parts that are given beside ``source`` replace its own.

    Raises:
        BadCheckpoint: a file is none of its kind, or one of a folder is missing.
        BadRequest: a path where nothing is, no transformer, or ``variant`` without a folder.
        Unsupported: a folder of a pipeline that no family runs.
    """
    given = {role: Part(_checked(path, role), kind_of(role)) for role, path in parts.items() if path is not None}
    given |= {role: Part(_checked(path, role), kind_of(role)) for role, path in _encoders(text_encoders).items()}
    for argument, text in (("variant", variant), ("name", name)):
        if text is not None and (not isinstance(text, str) or not text):
            raise BadRequest(f"{argument}: {text!r:.100} of type {type(text).__name__}; give a text")
    if source is None:
        if variant is not None:
            raise BadRequest(f"variant {variant!r}: it selects files of a folder; give the folder, or leave it out")
        if TRANSFORMER not in given:
            raise BadRequest("Pipeline.open: no transformer; give a folder, a checkpoint, or transformer=")
        found = Source(name=name or _name_of(given[TRANSFORMER].path), parts=given)
    else:
        path = _checked(source, "source")
        name = name or _name_of(os.path.realpath(path))
        if is_pipeline(path):
            own = read_folder(path, name, variant)
        elif os.path.isdir(path):
            raise BadCheckpoint(
                f"{path}: no folder of a pipeline: it has no {INDEX}; lend one model's folder by transformer=, vae= "
                "and text_encoders="
            )
        else:
            own = Source(name=name, parts=_parts_of_file(path))
        if any(role.startswith(ENCODERS) for role in given):
            own = replace(own, parts={role: each for role, each in own.parts.items() if not role.startswith(ENCODERS)})
        found = replace(own, parts={**own.parts, **given}, has_own_transformer=TRANSFORMER not in given)
        if TRANSFORMER in given and has_config(given[TRANSFORMER].path):  # which the workers obey
            found = replace(found, variant="class")
    if tokenizers is not None:
        found = replace(found, tokenizers=_tokenizers(tokenizers))
    if scheduler is not None:
        config = scheduler if isinstance(scheduler, Mapping) else read_scheduler(Path(_checked(scheduler, "scheduler")))
        found = replace(found, scheduler=config)
    return found


def _name_of(path: str) -> str:
    """Return the name of a folder, whose dots are part of it (``FLUX.1-dev``), or of a file without its suffix."""
    return Path(path).name if os.path.isdir(path) else Path(path).stem


def _encoders(given: Paths) -> dict[str, PathLike]:
    if isinstance(given, Mapping):
        wrong = [role for role in given if not str(role).startswith(ENCODERS)]
        if wrong:
            raise BadRequest(f"text_encoders: {wrong[0]!r} is no role; use text_encoder, text_encoder_2 and so on")
        return dict(given)
    if isinstance(given, str | os.PathLike):
        given = [given]
    if not isinstance(given, list | tuple):
        raise BadRequest(f"text_encoders: {given!r:.100} of type {type(given).__name__}; give paths, or a dict by role")
    return {role_of_encoder(number): path for number, path in enumerate(given, 1)}


def role_of_encoder(number: int) -> str:
    """Return the role of a text encoder by its number, from 1."""
    return ENCODERS if number == 1 else f"{ENCODERS}_{number}"


def _tokenizers(given: PathLike | Mapping[str, PathLike]) -> dict[str, str]:
    if isinstance(given, Mapping):
        return {role: _checked(path, f"tokenizers[{role!r}]") for role, path in given.items()}
    folder = Path(_checked(given, "tokenizers"))
    if not os.path.isdir(folder):
        raise BadRequest(f"tokenizers: {folder}: no folder; give one with tokenizers, or a checkout of ComfyUI")
    try:
        every = sorted(folder.iterdir())
    except OSError as error:
        raise BadRequest(f"tokenizers: {folder}: {error.strerror}") from None
    inner = [each for each in every if os.path.isdir(each) and each.name.startswith(("tokenizer", "proc"))]
    if inner:
        return {each.name: str(each) for each in inner}
    return {"": str(folder)}


COMFYUI: Final = {
    "CLIPTokenizer": "comfy/sd1_tokenizer",
    "T5Tokenizer": "comfy/text_encoders/t5_tokenizer",
    "Qwen2Tokenizer": "comfy/text_encoders/qwen25_tokenizer",
}
"""Where a checkout of ComfyUI has tokenizers, by their classes. It keeps others in the encoders' files."""


def tokenizer_path(given: Mapping[str, str], role: str, classes: Sequence[str]) -> str | None:
    """Return the folder of the tokenizer of a role, of one of these classes; ``None`` if there is none.

    A folder that was given for all roles (named ``""``) is one tokenizer's own, or a checkout of ComfyUI.
    """
    whole = given.get("")
    if role in given or whole is None:
        return given.get(role)
    if not os.path.isdir(os.path.join(whole, "comfy")):
        return whole
    known = (COMFYUI.get(each.removesuffix("Fast")) for each in classes)
    found = (os.path.join(whole, each) for each in known if each is not None)
    return next((each for each in found if os.path.isdir(each)), None)


def _checked(path: PathLike, role: str) -> str:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise BadRequest(f"{role}: {path!r:.100} of type {type(path).__name__} is no path of a file or a folder")
    found = user_path(path)
    check_is_there(found, role)
    return str(found)


def _parts_of_file(path: str) -> dict[str, Part]:
    """Return the parts of an all-in-one checkpoint, or of a file with a transformer alone.

    Raises:
        BadCheckpoint: not a safetensors or GGUF file.
    """
    from xditd.client.file_headers import read_header
    from xditd.ipc.transports.file import LentFile

    lent = LentFile(path)
    try:
        names = [stored.name for stored in read_header(lent).tensors]
    finally:
        lent.close()
    found = {TRANSFORMER: Part(path, ComponentKind.TRANSFORMER)}
    encoders: list[str] = []
    for prefix in by_prefix(names):
        segments = prefix.split(".")
        if any(segment in _VAE_MARKS for segment in segments):
            found[VAE] = Part(path, ComponentKind.VAE)
        elif any(segment.startswith(_ENCODER_MARKS) for segment in segments):
            encoders.append(prefix)
    roots = sorted({_root_of(prefix) for prefix in encoders})
    for number, root in enumerate(roots, 1):
        found[role_of_encoder(number)] = Part(path, ComponentKind.TEXT_ENCODER, prefix=root if len(roots) > 1 else None)
    return found


def _root_of(prefix: str) -> str:
    """Return what all names of one text encoder in a checkpoint begin with: ``text_encoders.t5xxl.``."""
    first, *rest = prefix.rstrip(".").split(".")
    return f"{first}.{rest[0]}." if first == "text_encoders" and rest else f"{first}."
