"""The registry of model families: our own, then those of other packages.

Ours are imported with the first checkpoint, others with the first that none of ours claims. A package registers a
family by an entry point of the group ``xditd.families``: a class, called without arguments, that follows
:class:`~xditd.gpu_workers.models.family.Family`. Its members are checked when it is loaded, its operations when the
first component is lent: only these may import xfuser and diffusers.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, cast

from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.family import Family, Kind
from xditd.gpu_workers.models.operations import (
    ControlNetOperations,
    Operations,
    Recipe,
    TextEncoderOperations,
    TransformerOperations,
    VaeOperations,
)
from xditd.ipc.errors import BadRequest, UnknownFamily, Unsupported
from xditd.ipc.name_lists import listed
from xditd.ipc.recognition import one_of
from xditd.ipc.tensor_names import by_prefix
from xditd.ipc.tensors import ModuleDescription

logger = logging.getLogger(__name__)

FAMILIES: Final = (
    ("xditd.gpu_workers.families.flux1.checkpoint", "Flux1"),
    ("xditd.gpu_workers.families.flux1.controlnet_checkpoint", "Flux1ControlNet"),
    ("xditd.gpu_workers.families.flux2.checkpoint", "Flux2"),
    ("xditd.gpu_workers.families.flux_vae.checkpoint", "FluxVae"),
    ("xditd.gpu_workers.families.flux2_vae.checkpoint", "Flux2Vae"),
    ("xditd.gpu_workers.families.clip_l", "ClipL"),
    ("xditd.gpu_workers.families.t5", "T5"),
    ("xditd.gpu_workers.families.t5", "UMT5"),
    ("xditd.gpu_workers.families.wan.checkpoint", "Wan"),
    ("xditd.gpu_workers.families.wan.checkpoint", "WanVace"),
    ("xditd.gpu_workers.families.z_image.checkpoint", "ZImage"),
    ("xditd.gpu_workers.families.language_models.checkpoint", "Qwen3"),
    ("xditd.gpu_workers.families.language_models.checkpoint", "Mistral3"),
    ("xditd.gpu_workers.families.qwen_image.checkpoint", "QwenImage"),
    ("xditd.gpu_workers.families.wan_vae.checkpoint", "WanVae"),
    ("xditd.gpu_workers.families.qwen2_5_vl.checkpoint", "Qwen25Vl"),
)
"""Module and class of each of our families, in the order of :func:`detect`."""

DESCRIBED: Final = ("xditd.gpu_workers.families.clip_vision",)
"""Modules that describe files of a model which runs as its class, although the client gave no configuration."""

ENTRY_POINTS: Final = "xditd.families"
"""The group of entry points of other packages' families. All ranks load them in the order of their names."""

OPERATIONS: Final[dict[Kind, type]] = {
    "transformer": TransformerOperations,
    "vae": VaeOperations,
    "text_encoder": TextEncoderOperations,
    "controlnet": ControlNetOperations,
}
"""The protocol of each kind."""


@dataclass(frozen=True, slots=True)
class OtherFamilies:
    """The families of other packages, and a message for each that cannot be used."""

    families: tuple[Family[Any], ...]
    faults: tuple[str, ...]


def families() -> tuple[Family[Any], ...]:
    """Return all families in the order of :func:`detect`, ours first; the first call imports them."""
    return own_families() + other_families().families


@cache
def own_families() -> tuple[Family[Any], ...]:
    """Return our own families."""
    return tuple(getattr(import_module(module), name)() for module, name in FAMILIES)


@cache
def other_families() -> OtherFamilies:
    """Return the families of installed packages. One that cannot be loaded is logged and left out."""
    found: list[Family[Any]] = []
    faults: list[str] = []
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: (entry.name, entry.value)):
        try:
            found.append(_load(entry, {family.name for family in (*own_families(), *found)}))
        except (Exception, SystemExit) as error:  # any error of another package's code
            package = "a package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
            faults.append(f"{entry.name} of {package} ({type(error).__name__}: {error})")
            logger.error(
                "family of another package cannot be used: entry_point=%s value=%s package=%s",
                entry.name, entry.value, package, exc_info=error,
            )  # fmt: skip
    return OtherFamilies(tuple(found), tuple(faults))


def describe(shapes: Mapping[str, Shape]) -> ModuleDescription | None:
    """Return the class and the configuration of a file whose model runs as its class; ``None`` for other files."""
    for module in DESCRIBED:
        found: ModuleDescription | None = import_module(module).describe(shapes)
        if found is not None:
            return found
    return None


def titles() -> tuple[str, ...]:
    """Return the titles of all families, for error messages."""
    return tuple(family.title for family in families())


def load_faults_note() -> str:
    """Return the end of an error message: which families could not be loaded, and why; mostly empty."""
    faults = other_families().faults
    return f"; not asked, since they could not be loaded: {listed(faults, joint='; ')}" if faults else ""


def detect(names: Collection[str], kind: Kind | None = None) -> Family[Any]:
    """Return the family of a checkpoint with these tensor names; with a ``kind``, one of that kind.

    Raises:
        UnknownFamily: none claims the names; the message shows some of them, what can be run, and which families could
            not be loaded.
        BadRequest: a family of another kind claims them.
        Unsupported: two families of the kind claim tensors, under two prefixes.
    """
    groups = by_prefix(names)

    def claimed_by(asked: tuple[Family[Any], ...]) -> Family[Any] | None:
        wanted = [each for each in asked if kind in (None, each.kind)]
        found = [each for group in groups.values() for each in wanted if each.claims(group)]
        several = sorted({each.name for each in found})
        if kind is not None and len(several) > 1:
            what = f"{len(several)} of the kind {kind} in one file ({', '.join(several)})"
            raise Unsupported(f"{what}: lend one at a time, from a file or a state dict that holds no other")
        return next((each for each in wanted if each in found), None)

    family = claimed_by(own_families()) or claimed_by(other_families().families)
    if family is not None:
        return family
    if kind is not None:
        other = detect(names)
        raise BadRequest(f"lent as {kind}, but its tensors are those of {other.name}, a {other.kind}")
    raise UnknownFamily(
        f"no known model family: lend {one_of(titles())}; {len(names)} tensors: {listed(sorted(names))}; to run "
        "another model as its class, lend a module of diffusers or transformers, or a folder of save_pretrained"
        f"{load_faults_note()}",
        names=sorted(names),
    )


def operations_of(family: Family[Any]) -> Operations[Any]:
    """Return the operations of a family; the first call imports them.

    Raises:
        Unsupported: members of the protocol of its kind are missing; names them.
    """
    operations = family.operations
    protocol = OPERATIONS[family.kind]
    missing = _missing(operations, protocol)
    if family.kind == "transformer" and "recipe" not in missing:
        missing += [f"recipe.{member}" for member in _missing(cast(Any, operations).recipe, Recipe)]
    if missing:
        raise Unsupported(
            f"{family.name} cannot be run: {type(operations).__module__}:{type(operations).__qualname__} lacks "
            f"{listed(missing)}; its package has to give it all members of the {protocol.__name__} protocol",
            names=missing,
        )
    return operations


def _load(entry: EntryPoint, taken: Collection[str]) -> Family[Any]:
    """Import a family by its entry point, and check its members.

    Raises:
        TypeError: it lacks members of the protocol.
        ValueError: another family has its name, or its kind is unknown.
        Exception: whatever its package raises.
    """
    family: Family[Any] = entry.load()()
    missing = _missing(family, Family)
    if missing:
        raise TypeError(f"{entry.value} lacks {listed(missing)}: give it all members of the Family protocol")
    if family.name in taken:
        raise ValueError(f"a family named {family.name} exists already: give this one another name")
    if family.kind not in OPERATIONS:
        raise ValueError(f"{family.name} is of kind {family.kind!r}: use one of {', '.join(OPERATIONS)}")
    return family


def _missing(given: object, protocol: type) -> list[str]:
    """Return the members of a protocol that an object lacks. Looks at the class first, so that no property runs."""
    return [member for member in _members(protocol) if not hasattr(type(given), member) and not hasattr(given, member)]


@cache
def _members(protocol: type) -> tuple[str, ...]:
    """Return the public members of a protocol."""
    protocols = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    members = {name for base in protocols for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    return tuple(sorted(name for name in members if not name.startswith("_")))
