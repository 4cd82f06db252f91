"""Check a model of ``models.toml``: its files, their headers, the families that run them, and whether the parts fit.

No daemon and no GPU is used: the workers' code matches the headers, in a process of its own, as it would for a lend.
The bytes of tensors are not read.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from xditd.client import lending
from xditd.client.model_folders import find_model, has_config, has_variant
from xditd.client.model_json import read_json
from xditd.client.models_file import ModelEntry
from xditd.client.part_checks import kind_fault, misfits
from xditd.client.pipeline.folders import is_model, is_read
from xditd.client.pipeline.opening import Opening, opening_of_entry, rules_of
from xditd.client.pipeline.sources import SECOND
from xditd.client.subprograms import module_command, module_environment
from xditd.ipc.errors import BadCheckpoint, BadRequest, XditdError
from xditd.ipc.facts import ComponentFacts
from xditd.ipc.tensors import ComponentKind, Manifest

INDEX: Final = "model_index.json"
SCHEDULER: Final = "scheduler_config.json"
MAX_INDEX_BYTES: Final = 2**20
_DEADLINE_S: Final = 300.0
"""Importing torch, diffusers and xfuser takes most of the time: a minute on a cold or busy disk."""

_KINDS: Final = {
    "transformer": ComponentKind.TRANSFORMER,
    "transformer_2": ComponentKind.TRANSFORMER,
    "vae": ComponentKind.VAE,
    "text_encoders": ComponentKind.TEXT_ENCODER,
    "image_encoder": ComponentKind.MODULE,
}
_ALWAYS_UNCHECKED: Final = ("the values of tensors", "whether the GPUs of the workers have room for them")


@dataclass
class PartCheck:
    """What is known of one part: ``part`` is its key in the file, or the folder's name in a pipeline.

    ``files`` and ``size_bytes`` are of all its weights; ``facts`` what the workers say of it, if they were asked.
    """

    part: str
    path: str
    kind: ComponentKind | None = None
    files: tuple[str, ...] = ()
    size_bytes: int = 0
    facts: ComponentFacts | None = None
    fault: str | None = None
    manifest: Manifest | None = field(default=None, repr=False)


@dataclass
class ModelCheck:
    """What is known of a model; without ``faults`` it can be used. ``unchecked``: what was not looked at."""

    name: str
    parts: list[PartCheck]
    faults: list[str]
    unchecked: list[str]
    opening: Opening | None = field(default=None, repr=False)
    """As ``Pipeline.open`` finds it; ``None`` if it or a part is refused."""


def check_models(entries: Mapping[str, ModelEntry], *, asks_workers: bool = True) -> list[ModelCheck]:
    """Check models. ``asks_workers`` also matches their tensors, which takes some ten seconds in all."""
    found = [_check_files(entry) for entry in entries.values()]
    if asks_workers:
        _ask(found)
    for check in found:
        entry = entries[check.name]
        for part in check.parts:
            if part.facts is not None and part.kind not in (None, ComponentKind.MODULE):
                part.fault = kind_fault(part.facts, part.kind) or None
        check.faults += [f"{part.part}: {part.fault}" for part in check.parts if part.fault is not None]
        if all(part.facts is not None for part in check.parts if part.kind is not None):
            check.faults += _misfits([part for part in check.parts if part.facts is not None])
            check.faults += [] if check.faults else _refusals(check)
        elif asks_workers is False:
            check.unchecked.append("the families of the files, and whether the parts fit together (--quick)")
        if not any(part.kind is ComponentKind.TEXT_ENCODER for part in check.parts) and entry.checkpoint is None:
            check.unchecked.append("prompts: it has no text encoders, and takes text embeddings alone")
        if entry.checkpoint is not None:
            check.unchecked.append("the text encoders in the all-in-one checkpoint")
        if entry.tokenizers is not None or entry.folder is not None:
            check.unchecked.append("whether the tokenizers are those of the text encoders")
        if check.opening is not None and check.opening.source.scheduler is not None:
            check.unchecked.append("whether the transformer runs with the settings of the scheduler")
        check.unchecked += _ALWAYS_UNCHECKED
    return found


def _check_files(entry: ModelEntry) -> ModelCheck:
    """Open every file of a model and read its header."""
    check = ModelCheck(entry.name, [], [], [])
    try:
        check.parts += _parts(entry)
    except (BadRequest, BadCheckpoint) as error:
        check.faults.append(error.detail)
    for part in check.parts:
        try:
            _describe(part, entry)
        except XditdError as error:
            part.fault = error.detail
    if not check.faults and all(part.fault is None for part in check.parts):
        try:
            check.opening = opening_of_entry(entry)
        except XditdError as error:
            check.faults.append(error.detail)
    return check


def _parts(entry: ModelEntry) -> Iterator[PartCheck]:
    if entry.folder is not None:
        yield from _parts_of_folder(entry.folder)
        return
    for key, path in entry.paths:
        if key == "checkpoint":
            yield PartCheck("checkpoint, its transformer", path, ComponentKind.TRANSFORMER)
            if entry.vae is None:
                yield PartCheck("checkpoint, its VAE", path, ComponentKind.VAE)
        else:
            yield PartCheck(key, path, _KINDS.get(key))


def _parts_of_folder(folder: str) -> Iterator[PartCheck]:
    """Yield the models of a pipeline's folder, as its ``model_index.json`` names them.

    Raises:
        BadCheckpoint: there is no such file, or it is none of a pipeline.
    """
    index = os.path.join(folder, INDEX)
    if not os.path.isfile(index):
        what = "not a folder" if not os.path.isdir(folder) else f"has no {INDEX}"
        raise BadCheckpoint(f"folder {folder}: {what}; name the folder of a pipeline that diffusers has saved")
    for name, value in read_json(index, MAX_INDEX_BYTES).items():
        if name.startswith("_") or not is_read(name, value):
            continue
        where = os.path.join(folder, name)
        if os.path.basename(where) != name or not os.path.isdir(where):
            yield PartCheck(name, where, fault=f"{where}: {INDEX} names this folder, and it is not there")
        elif is_model(name):
            yield PartCheck(name, where, _kind_in_folder(name))


def _kind_in_folder(name: str) -> ComponentKind:
    """Return the kind of a component by its name in a pipeline; others run as their class."""
    for start, kind in (
        ("transformer", ComponentKind.TRANSFORMER),
        ("vae", ComponentKind.VAE),
        ("text_encoder", ComponentKind.TEXT_ENCODER),
    ):
        if name.startswith(start):
            return kind
    return ComponentKind.MODULE


def _describe(part: PartCheck, entry: ModelEntry) -> None:
    """Read the headers of a part, and describe it as for a lend.

    Raises:
        XditdError: as ``lending.describe``.
    """
    if part.fault is not None:
        return
    if part.kind is None:
        is_folder = os.path.isdir(part.path)
        if part.part == "tokenizers" and not is_folder:
            raise BadRequest(f"{part.path}: not a folder; name the folder with the tokenizers")
        if part.part == "scheduler":
            read_json(os.path.join(part.path, SCHEDULER) if is_folder else part.path, MAX_INDEX_BYTES)
        return
    in_folder = entry.folder is not None
    variant = entry.variant if entry.variant and in_folder and has_variant(part.path, entry.variant) else None
    is_folder = in_folder or has_config(part.path)
    files = find_model(part.path, variant=variant, has_class=is_folder)
    is_transformer = part.kind is ComponentKind.TRANSFORMER
    offer = lending.describe(
        part.path,
        kind=None if is_folder or part.kind is ComponentKind.MODULE else part.kind,
        variant=variant,
        compute_dtype=entry.compute_dtype if is_transformer else None,
    )
    part.manifest = offer.manifest
    offer.close()
    part.files = tuple(os.path.realpath(path) for path in files.paths)
    part.size_bytes = sum(os.path.getsize(path) for path in part.files)


def _ask(checks: list[ModelCheck]) -> None:
    """Have the workers' code match all manifests; sets facts and faults."""
    asked = [part for check in checks for part in check.parts if part.manifest is not None]
    if not asked:
        return
    answers = _run([part.manifest for part in asked if part.manifest is not None])
    if isinstance(answers, str):
        for check in checks:
            check.unchecked.append(f"the families of the files, and whether the parts fit together: {answers}")
        return
    for part, answer in zip(asked, answers, strict=True):
        if "error" in answer:
            part.fault = str(answer["error"]["message"])
        else:
            part.facts = msgspec.convert(answer["facts"], type=ComponentFacts)


def _run(manifests: list[Manifest]) -> list[dict[str, Any]] | str:
    """Run ``xditd.gpu_workers.process.checkpoint_check``; returns its answers, or why there are none."""
    # It computes nothing, and a CUDA context would take memory from the workers.
    environ = {**module_environment(), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = module_command("xditd.gpu_workers.process.checkpoint_check", [])
    try:
        done = subprocess.run(
            command, input=msgspec.json.encode(manifests), cwd="/", env=environ, capture_output=True,
            timeout=_DEADLINE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {_DEADLINE_S:.0f} s"
    if done.returncode == 0:
        try:
            found = msgspec.json.decode(done.stdout, type=list[dict[str, Any]])
        except msgspec.MsgspecError:
            return f"the answer is not JSON: {done.stdout[:200]!r}"
        if len(found) == len(manifests):
            return found
        return f"{len(found)} answers to {len(manifests)} questions"
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no output"]
    if "ModuleNotFoundError" in last[0]:
        return f"the workers' libraries are not installed here ({last[0]}); pip install 'xditd[workers]'"
    return f"status {done.returncode}: {last[0]:.300}"


def _misfits(parts: list[PartCheck]) -> Iterator[str]:
    known = [(part.part, part.facts) for part in parts if part.facts is not None]
    encoders = [(name, each) for name, each in known if each.text_encoder is not None]
    for name, fault in misfits(dict(known), encoders):
        yield f"{name}: {fault}"


def _refusals(check: ModelCheck) -> Iterator[str]:
    """Say what ``Pipeline.open`` refuses of a model whose parts are all taken."""
    transformers = [
        part.facts for part in check.parts if part.kind is ComponentKind.TRANSFORMER and part.part != SECOND
    ]
    if check.opening is None or not transformers or transformers[-1] is None:
        return
    try:
        rules_of(check.opening.source, transformers[-1], check.opening.defaults)
    except XditdError as error:
        yield error.detail
