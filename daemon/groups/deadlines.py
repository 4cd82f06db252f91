"""How long a worker group may be silent: by what it does, and by how long the same took before."""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from enum import Enum
from typing import Final

from xditd.daemon.configuration import Configuration
from xditd.daemon.operations.event_loop import Deadline, EventLoop
from xditd.ipc import arguments
from xditd.ipc.arguments import Argument
from xditd.ipc.awake_clock import AwakeClock
from xditd.ipc.requests import Call, Generate, InferenceRequest
from xditd.ipc.tensors import IoTensor
from xditd.ipc.worker_messages import AnyCommand, Plug, Prepare, Run, StepReached, Unmap

FACTOR: Final = 20
"""A step may take so many times as long as the median one. Another program on the GPU slows it down by a few times."""

SLOWEST_BYTES_PER_S: Final = 64 * 2**20
"""What lent bytes may at least be expected to move at: a file on a slow disk, read for the first time."""

_KEPT_SAMPLES: Final = 31
_KEPT_KINDS: Final = 256


class Phase(Enum):
    """Parts of a job that take their own time. A job without steps is all ``END``."""

    FIRST_STEP = "first_step"
    STEP = "step"
    END = "end"


class LearnedDurations:
    """Learn how long each kind of job takes, and say how long to wait for its next sign.

    What was never seen may take ``hang_deadline_s``: the first step plugs weights in and compiles. What was seen may
    take :data:`FACTOR` times the median, at least ``step_deadline_s`` and at most ``hang_deadline_s``. Mapping gets
    ``lend_deadline_s``, and more for more bytes. ``now_s`` reads the clock by which steps are measured.
    """

    def __init__(
        self,
        *,
        hang_deadline_s: float,
        step_deadline_s: float,
        lend_deadline_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self._hang_s = hang_deadline_s
        self._step_s = step_deadline_s
        self._lend_s = lend_deadline_s
        self._now_s = now_s
        self._samples: OrderedDict[Hashable, deque[float]] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._job: Hashable = None
        self._has_uneven_steps = False
        self._phase: Phase | None = None
        self._since_s = 0.0

    @classmethod
    def of(cls, configuration: Configuration, clock: AwakeClock) -> LearnedDurations:
        return cls(
            hang_deadline_s=configuration.hang_deadline_s,
            step_deadline_s=configuration.step_deadline_s,
            lend_deadline_s=configuration.lend_deadline_s,
            now_s=clock.now_s,
        )

    def forget(self) -> None:
        """A new group compiles anew, and has nothing mapped."""
        self._samples.clear()
        self._sizes.clear()
        self._phase = None

    def begin(self, command: AnyCommand) -> float:
        """Note that a command was sent; returns the seconds until its next sign is overdue."""
        self._phase = None
        if isinstance(command, Run):
            job = command.job
            self._job = kind_of(job)
            self._has_uneven_steps = isinstance(job, Generate) and job.sampling.step_cache_threshold > 0.0
            return self._enter(Phase.FIRST_STEP if isinstance(job, Generate) else Phase.END)
        if isinstance(command, Prepare):
            self._sizes[command.component_id] = command.manifest.tensor_bytes
        size_bytes = self._sizes.get(getattr(command, "component_id", ""), 0)
        if isinstance(command, Unmap):
            self._sizes.pop(command.component_id, None)
        elif isinstance(command, Plug):
            size_bytes = 0  # nothing is read
        return self._lend_s + size_bytes / SLOWEST_BYTES_PER_S

    def step(self, step: int, total_steps: int) -> float:
        """Note that a step is done; returns the seconds until the next sign is overdue."""
        took_s = self._leave()
        if step >= total_steps:
            return self._enter(Phase.END)
        deadline_s = self._enter(Phase.STEP)
        if step == 1 and (self._job, Phase.STEP) not in self._samples:
            # The first step did all that a later one does, and more.
            deadline_s = self._bounded(took_s)
        if self._has_uneven_steps:
            # Most may be spared, and any may be computed in full, as the first was.
            deadline_s = self._bounded(statistics.median(self._samples[self._job, Phase.FIRST_STEP]))
        return deadline_s

    def end(self) -> None:
        """Note that every rank has done the command."""
        if self._phase is not None:
            self._leave()

    def discard(self) -> None:
        """Note that the command was refused, failed or was cancelled: the time it took says nothing of the next one."""
        self._phase = None

    def _enter(self, phase: Phase) -> float:
        self._phase, self._since_s = phase, self._now_s()
        samples = self._samples.get((self._job, phase))
        return self._hang_s if samples is None else self._bounded(statistics.median(samples))

    def _leave(self) -> float:
        took_s = self._now_s() - self._since_s
        key = (self._job, self._phase)
        self._samples.setdefault(key, deque(maxlen=_KEPT_SAMPLES)).append(took_s)
        self._samples.move_to_end(key)
        while len(self._samples) > _KEPT_KINDS:
            self._samples.popitem(last=False)
        self._phase = None
        return took_s

    def _bounded(self, typical_s: float) -> float:
        return min(self._hang_s, max(self._step_s, FACTOR * typical_s))


def kind_of(job: InferenceRequest) -> Hashable:
    """What decides how long a job's steps take: components, shapes and sizes, not seeds or the number of steps."""
    found: list[Hashable] = [type(job)]
    for name in job.__struct_fields__:  # msgspec.structs.fields would work out the types anew in every call
        value = getattr(job, name)
        if isinstance(value, IoTensor):
            found.append((name, value.dtype, value.shape))
        elif name.endswith("_id") and name != "request_id":
            found.append((name, value))
    if isinstance(job, Generate):
        sampling = job.sampling
        found += sorted(job.components.items())
        found.append((sampling.height, sampling.width, sampling.step_cache_threshold > 0.0))
        found += _shapes(job.conditioning)
    elif isinstance(job, Call):
        for number, part in enumerate(job.parts):
            found += [number, *_shapes(part.arguments)]
    return tuple(found)


def _shapes(tree: dict[str, Argument]) -> Iterator[Hashable]:
    return ((path, tensor.dtype, tensor.shape) for path, tensor in arguments.tensors(tree))


class CommandDeadline:
    """Call ``on_missed(silent_s)`` once the next sign of progress of a command is overdue.

    Each sign earns the time that the next one usually takes. One timer serves all commands.
    """

    def __init__(self, loop: EventLoop, durations: LearnedDurations, on_missed: Callable[[float], None]) -> None:
        self._durations = durations
        self._on_missed = on_missed
        self._deadline = Deadline(loop, self._missed)
        self._is_running = False
        self._is_cancelled = False

    @property
    def overdue_s(self) -> float:
        """How long a command has been silent beyond its deadline; 0 while it is within, and between commands."""
        return self._deadline.overdue_s if self._is_running else 0.0

    def begin(self, command: AnyCommand) -> None:
        self._is_running, self._is_cancelled = True, False
        self._deadline.extend(self._durations.begin(command))

    def step_reached(self, step: StepReached) -> None:
        deadline_s = self._durations.step(step.step, step.total_steps)
        if not self._is_cancelled:
            self._deadline.extend(deadline_s)

    def cancelled(self) -> None:
        """The job is to end: further steps earn it no more time."""
        self._is_cancelled = True

    def answered(self, *, is_done: bool) -> None:
        """Every rank has answered; ``is_done`` unless one of them refused or failed."""
        self._is_running = False
        if is_done:
            self._durations.end()
        else:
            self._durations.discard()

    def group_ended(self) -> None:
        self._is_running = False
        self._deadline.stop()
        self._durations.forget()

    def _missed(self) -> None:
        if self._is_running:
            self._on_missed(self._deadline.waited_s)
