"""Registry of the faults of a soak test: name, frequency, expected outcome."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from crowd import ClientProcesses
from record import Record
from target import Target


class Broken(Exception):
    """A guarantee is broken; the daemon is then restarted."""


class NotNow(Exception):
    """The fault cannot be injected now, because the group is being rebuilt."""


@dataclass(frozen=True)
class StressRun:
    """The objects on which a fault acts."""

    target: Target
    clients: ClientProcesses
    record: Record
    rng: random.Random


class Pace(enum.Enum):
    """How often a fault is injected."""

    BY_CLIENTS = "by clients"
    """By the clients themselves (``clients.py``)."""
    LIGHT = "light"
    """Every few seconds."""
    HEAVY = "heavy"
    """In turn with the other heavy faults, and only after new right results."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault. ``inject`` injects it, and raises :class:`Broken` if a guarantee does not hold."""

    name: str
    pace: Pace
    expects: str
    inject: Callable[[StressRun], None] | None = None
    weight: int = 1
    """Relative frequency of a light fault."""


BY_CLIENTS = (
    Fault("cancel", Pace.BY_CLIENTS, "the job ends as cancelled"),
    Fault("return", Pace.BY_CLIENTS, "a loan returned during a job: the job ends as lease_lost"),
    Fault("leave", Pace.BY_CLIENTS, "a session closed during a job: others are served"),
    Fault("rewrite-file", Pace.BY_CLIENTS, "a lent file rewritten in place, mtime restored: stale_source"),
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
