"""The model families that can be recognised and run: a list of our own, then those of other packages.

Ours are imported when the first checkpoint comes, others when one comes that none of ours claims. A package offers a
family by an entry point of the group ``xditd.families`` that names a class, which is called without arguments and gives
a :class:`~xditd.gpu_workers.models.family.Family`. What it says of files is looked at when it is found, what it can do
with a component when the first one of it is lent: only then may xfuser and diffusers be imported.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, cast

from xditd.gpu_workers.models.family import Family, Kind
from xditd.gpu_workers.models.operations import (
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

logger = logging.getLogger(__name__)

FAMILIES: Final = (
    ("xditd.gpu_workers.families.flux1.checkpoint", "Flux1"),
    ("xditd.gpu_workers.families.flux_vae.checkpoint", "FluxVae"),
    ("xditd.gpu_workers.families.clip_l", "ClipL"),
    ("xditd.gpu_workers.families.t5", "T5"),
    ("xditd.gpu_workers.families.z_image.checkpoint", "ZImage"),
)
"""Module and class of each of ours, in the order in which they are asked whether a checkpoint is theirs."""

ENTRY_POINTS: Final = "xditd.families"
"""The group of entry points by which other packages offer theirs. All ranks ask them in the order of their names."""

OPERATIONS: Final[dict[Kind, type]] = {
    "transformer": TransformerOperations,
    "vae": VaeOperations,
    "text_encoder": TextEncoderOperations,
}
"""The protocol of each kind."""


@dataclass(frozen=True, slots=True)
class Others:
    """Families of other packages, and for each that cannot be used, what it is and why."""

    families: tuple[Family[Any], ...]
    faults: tuple[str, ...]


def families() -> tuple[Family[Any], ...]:
    """All of them, imported with the first call: ours first, in the order in which they are asked."""
    return own_families() + other_families().families


@cache
def own_families() -> tuple[Family[Any], ...]:
    """Ours."""
    return tuple(getattr(import_module(module), name)() for module, name in FAMILIES)


@cache
def other_families() -> Others:
    """Those of installed packages. One that cannot be used is logged and left out, whatever is wrong with it."""
    found: list[Family[Any]] = []
    faults: list[str] = []
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: (entry.name, entry.value)):
        try:
            found.append(_load(entry, {family.name for family in (*own_families(), *found)}))
        except (Exception, SystemExit) as error:  # another package's code: whatever it raises, it breaks no other lend
            package = "a package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
            faults.append(f"{entry.name} of {package} ({type(error).__name__}: {error})")
            logger.error(
                "family of another package cannot be used: entry_point=%s value=%s package=%s",
                entry.name, entry.value, package, exc_info=error,
            )  # fmt: skip
    return Others(tuple(found), tuple(faults))


def titles() -> tuple[str, ...]:
    """What can be run, in people's words."""
    return tuple(family.title for family in families())


def left_out() -> str:
    """The end of a message about what no family claims: the ones that were not asked, and why; mostly empty."""
    faults = other_families().faults
    return f"; not asked, since they could not be loaded: {listed(faults, joint='; ')}" if faults else ""


def detect(names: Collection[str], kind: Kind | None = None) -> Family[Any]:
    """Return the family to which a checkpoint with these tensor names belongs; with a ``kind``, one of that kind.

    Raises:
        UnknownFamily: none claims the names; the message shows some of them, what can be run, and which families could
            not be loaded.
        BadRequest: a family of another kind claims them.
        Unsupported: tensors under one prefix are of one family, and those under another of a second one of the kind.
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
        f"no known model family: lend {one_of(titles())}; {len(names)} tensors: {listed(sorted(names))}{left_out()}",
        names=sorted(names),
    )


def operations_of(family: Family[Any]) -> Operations[Any]:
    """Return what jobs do with components of a family; the first time, this imports what they need.

    Raises:
        Unsupported: it lacks members of the protocol of its kind; names them.
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
    """Import what an entry point names, and look whether it is a family.

    Raises:
        TypeError: it lacks members of the protocol.
        ValueError: another family has its name, or there is nothing of its kind.
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
    """Name the members of a protocol that an object lacks. Its class is asked first: no property runs that is there."""
    return [member for member in _members(protocol) if not hasattr(type(given), member) and not hasattr(given, member)]


@cache
def _members(protocol: type) -> tuple[str, ...]:
    """The public members of a protocol."""
    protocols = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    members = {name for base in protocols for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    return tuple(sorted(name for name in members if not name.startswith("_")))
