"""Variants of a component: LoRAs that a job adds to it, switched on for that job by reference.

A switch writes one tuple of branches for each layer, and reads and copies no weight.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from xditd.gpu_workers.kernels.branches import Branches
from xditd.gpu_workers.models.lora_binding import AnyModel, BoundLora, LentLora
from xditd.gpu_workers.models.operations import BranchMemory
from xditd.ipc import limits
from xditd.ipc.job_parts import LoraUse
from xditd.ipc.name_lists import listed
from xditd.ipc.status import LoraCounts

logger = logging.getLogger(__name__)


class LoraCounters:
    """Jobs with LoRAs and switches of one rank, since it started."""

    def __init__(self) -> None:
        self.jobs = 0
        self.switches = 0
        self.last_switch_ms = 0.0
        self.slowest_switch_ms = 0.0
        self.bound = 0
        self.converted_bytes = 0
        self.model: weakref.ref[AnyModel] | None = None
        """That of the last job."""

    def note_switch(self, took_ms: float) -> None:
        self.switches += 1
        self.last_switch_ms = took_ms
        self.slowest_switch_ms = max(self.slowest_switch_ms, took_ms)

    def report(self, memory: Iterable[BranchMemory] = ()) -> LoraCounts:
        """Return the counts, with those of the copies of factors that models have."""
        known = list(memory)
        model = None if self.model is None else self.model()
        return LoraCounts(
            jobs=self.jobs,
            switches=self.switches,
            last_switch_ms=self.last_switch_ms,
            slowest_switch_ms=self.slowest_switch_ms,
            bound=self.bound,
            converted_bytes=self.converted_bytes,
            detail="" if model is None else model.lora_detail[: limits.MAX_TEXT_CHARS],
            forwards=sum(each.counts.forwards for each in known),
            launched=sum(each.counts.launched for each in known),
            layouts=sum(each.counts.layouts for each in known),
            copied_bytes=sum(each.counts.copied_bytes for each in known),
            memory_bytes=sum(each.nbytes for each in known),
        )


Schedule = tuple[tuple[int, float], ...]
"""The strengths of a LoRA, each from a step on, ascending from 0."""


@dataclass(frozen=True, eq=False)
class LoraVariant:
    """LoRAs of a model with their strengths, ready to be switched on. Without any it is the model itself."""

    loras: tuple[tuple[BoundLora, Schedule], ...]
    counters: LoraCounters

    @property
    def changes(self) -> bool:
        """Whether it differs from the model without LoRAs, in any step."""
        return any(strength for _, schedule in self.loras for _, strength in schedule)

    def begin_step(self, step: int = 0) -> tuple[tuple[int, float], ...]:
        """Set the strengths of a step.

        Returns what is equal for equal LoRAs of the model with equal strengths; it is empty if none has any.
        """
        for bound, schedule in self.loras:
            bound.strength.value = _strength_at(schedule, step)
        return tuple((bound.number, bound.strength.value) for bound, _ in self.loras if bound.strength.value)

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Switch the LoRAs on in the model's layers while the context lasts, with the strengths of the first step."""
        if not self.changes:
            yield
            return
        began_s = time.perf_counter()
        touched: list[Branches] = []
        try:
            self.begin_step()
            for bound, _ in self.loras:
                for branches, added in bound.slots:
                    branches.active += added
                    touched.append(branches)
            self.counters.note_switch((time.perf_counter() - began_s) * 1e3)
            yield
        finally:
            for branches in touched:
                branches.active = ()


def _strength_at(schedule: Schedule, step: int) -> float:
    return next(strength for start, strength in reversed(schedule) if start <= step)


def _schedule_of(uses: Sequence[LoraUse]) -> Schedule:
    """Return the sums of the strengths of all uses of one LoRA."""
    each = [((0, use.strength), *((later.step, later.strength) for later in use.later)) for use in uses]
    steps = sorted({start for schedule in each for start, _ in schedule})
    return tuple((step, sum(_strength_at(schedule, step) for schedule in each)) for step in steps)


def strengths_of(use: LoraUse) -> str:
    """Return the least and the largest strength of a LoRA in a job, for messages."""
    every = [use.strength, *(later.strength for later in use.later)]
    return f"{min(every):g} to {max(every):g}" if use.later else f"{use.strength:g}"


def prepare_variant(
    model: AnyModel, uses: Sequence[LoraUse], get: Callable[[str], LentLora], counters: LoraCounters
) -> LoraVariant:
    """Bind the LoRAs of a job to a model. A LoRA that is named twice has the sum of its strengths.

    Raises:
        UnknownComponent, BadRequest: a LoRA is not lent to this worker, or is none; see :meth:`LentLora.bind`.
    """
    if not uses:
        return LoraVariant((), counters)
    by_id: dict[str, list[LoraUse]] = {}
    for use in uses:
        by_id.setdefault(use.component_id, []).append(use)
    loras = []
    for component_id, of_one in by_id.items():
        lent = get(component_id)
        if not lent.is_bound_to(model):
            before = lent.converted_bytes
            bound = lent.bind(model)
            counters.bound += 1
            counters.converted_bytes += lent.converted_bytes - before
            if bound.unknown:
                logger.warning(
                    "layers of a LoRA are not in the model, and left out: label=%s component_id=%s family=%s count=%d "
                    "names=%s",
                    lent.label, component_id, model.title, len(bound.unknown), listed(bound.unknown),
                )  # fmt: skip
        loras.append((lent.bind(model), _schedule_of(of_one)))
    counters.jobs += 1
    counters.model = weakref.ref(model)
    return LoraVariant(tuple(loras), counters)
