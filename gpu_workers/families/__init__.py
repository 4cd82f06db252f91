"""The model families that can be recognised and run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from xditd.gpu_workers.families.base import Family
from xditd.gpu_workers.families.clip_l import ClipL
from xditd.gpu_workers.families.flux1 import Flux1
from xditd.gpu_workers.families.flux_vae import FluxVae
from xditd.gpu_workers.families.t5 import T5
from xditd.ipc.errors import UnknownFamily
from xditd.ipc.name_lists import listed
from xditd.ipc.tensor_names import by_prefix

FAMILIES: tuple[Family[Any], ...] = (Flux1(), FluxVae(), ClipL(), T5())


def detect(names: Collection[str]) -> Family[Any]:
    """Return the family to which a checkpoint with these tensor names belongs.

    Raises:
        UnknownFamily: none claims the names; the message shows some of them and the families that are known.
    """
    groups = by_prefix(names)
    for family in FAMILIES:
        if any(family.claims(group) for group in groups.values()):
            return family
    raise UnknownFamily(
        f"no known model family: lend one of {', '.join(family.name for family in FAMILIES)}; "
        f"{len(names)} tensors: {listed(sorted(names))}",
        names=sorted(names),
    )
