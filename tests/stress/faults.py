"""The faults of a soak, each by its name: what it does, and what has to come of it."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from crowd import Crowd
from record import Record
from target import Target


class Broken(Exception):
    """A promise does not hold; the daemon is started again after it."""


class NotNow(Exception):
    """There is nobody to do it to: the group is being rebuilt."""


@dataclass(frozen=True)
class Scene:
    """What a fault may lay hands on."""

    target: Target
    crowd: Crowd
    record: Record
    rng: random.Random


class Pace(enum.Enum):
    """How often a fault comes."""

    BY_CLIENTS = "by clients"
    """Clients commit it themselves (``clients.py``)."""
    LIGHT = "light"
    """Every few seconds."""
    HEAVY = "heavy"
    """In turn with the others of its kind, and only when results were right since the last one."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault. ``inject`` does it, and raises :class:`Broken` where what it sees is not as promised."""

    name: str
    pace: Pace
    expects: str
    inject: Callable[[Scene], None] | None = None
    weight: int = 1
    """Of a light fault among the light ones."""


BY_CLIENTS = (
    Fault("cancel", Pace.BY_CLIENTS, "the job ends as cancelled"),
    Fault("return", Pace.BY_CLIENTS, "a loan returned in mid-job: the job ends as lease_lost"),
    Fault("leave", Pace.BY_CLIENTS, "a session left in mid-job: others are served"),
    Fault("rewrite-file", Pace.BY_CLIENTS, "a lent file rewritten in place, mtime set back: stale_source"),
    Fault("touch-inode", Pace.BY_CLIENTS, "chmod, link or rename of a lent file: the result is right, or stale_source"),
    Fault("nan-weight", Pace.BY_CLIENTS, "a checkpoint with one NaN: not_finite, whatever the job"),
)


def all_faults() -> tuple[Fault, ...]:
    """Every fault, in the order in which ``--help`` lists them."""
    import folder_faults
    import process_faults

    return BY_CLIENTS + process_faults.FAULTS + folder_faults.FAULTS


def choose_faults(names: Iterable[str] | None, without: Iterable[str] = ()) -> tuple[Fault, ...]:
    """The faults of these names, or all, less those that are to be left out.

    Raises:
        ValueError: there is no fault of such a name.
    """
    known = {fault.name: fault for fault in all_faults()}
    wanted = list(known) if names is None else list(names)
    unknown = [name for name in (*wanted, *without) if name not in known]
    if unknown:
        raise ValueError(f"fault {unknown[0]!r}: unknown; choose from {', '.join(known)}")
    left_out = set(without)
    return tuple(known[name] for name in known if name in wanted and name not in left_out)
