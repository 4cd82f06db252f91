"""The model families that can be recognised and run: a list of names, imported when the first checkpoint comes."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib import import_module
from typing import Any, Final

from xditd.gpu_workers.models.family import Family
from xditd.ipc.errors import UnknownFamily
from xditd.ipc.name_lists import listed
from xditd.ipc.tensor_names import by_prefix

FAMILIES: Final = (
    ("xditd.gpu_workers.families.flux1.checkpoint", "Flux1"),
    ("xditd.gpu_workers.families.flux_vae.checkpoint", "FluxVae"),
    ("xditd.gpu_workers.families.clip_l", "ClipL"),
    ("xditd.gpu_workers.families.t5", "T5"),
)
"""Module and class of each, in the order in which they are asked whether a checkpoint is theirs."""


@cache
def families() -> tuple[Family[Any], ...]:
    """All of them, imported with the first call."""
    return tuple(getattr(import_module(module), name)() for module, name in FAMILIES)


def detect(names: Collection[str]) -> Family[Any]:
    """Return the family to which a checkpoint with these tensor names belongs.

    Raises:
        UnknownFamily: none claims the names; the message shows some of them and the families that are known.
    """
    groups = by_prefix(names)
    for family in families():
        if any(family.claims(group) for group in groups.values()):
            return family
    raise UnknownFamily(
        f"no known model family: lend one of {', '.join(family.name for family in families())}; "
        f"{len(names)} tensors: {listed(sorted(names))}",
        names=sorted(names),
    )
