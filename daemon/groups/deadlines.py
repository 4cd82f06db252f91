"""Deadlines of worker commands, learned from how long the same kind of job took before."""

from __future__ import annotations

import itertools
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from enum import Enum
from typing import Final

from xditd.daemon.configuration import Configuration
from xditd.daemon.operations.event_loop import Deadline, EventLoop
from xditd.ipc import arguments, limits
from xditd.ipc.arguments import Argument
from xditd.ipc.awake_clock import AwakeClock
from xditd.ipc.job_parts import LoraUse, LoraUses
from xditd.ipc.requests import Call, Generate, InferenceRequest
from xditd.ipc.tensors import IoTensor
from xditd.ipc.worker_messages import AnyCommand, FramesReached, Plug, Prepare, Run, StepReached, Unmap

FACTOR: Final = 20
"""A step may take this many times the median. Another program on the GPU may slow it down by a small factor."""

_KEPT_SAMPLES: Final = 31
_KEPT_KINDS: Final = 256


class Phase(Enum):
    """Parts of a job, measured separately. A job without steps has only ``END``.

    ``END`` ends with the first chunk of a video, if one is decoded; then come ``FRAMES``, and ``LAST`` after them.
    """

    FIRST_STEP = "first_step"
    STEP = "step"
    END = "end"
    FRAMES = "frames"
    LAST = "last"


class LearnedDurations:
    """Measure how long each kind of job takes, and compute the deadline of its next report.

    Without a measurement the deadline is ``hang_deadline_s``: the first step plugs weights and compiles. With one it is
    :data:`FACTOR` times the median, at least ``step_deadline_s`` and at most ``hang_deadline_s``. Mapping has
    ``lend_deadline_s``, and more for more bytes. ``now_s`` reads the clock that measures steps.
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
        """Drop all measurements: a new group compiles again, and has nothing mapped."""
        self._samples.clear()
        self._sizes.clear()
        self._phase = None

    def begin(self, command: AnyCommand) -> float:
        """Note that a command was sent; returns the seconds until its next report is overdue."""
        self._phase = None
        if isinstance(command, Run):
            job = command.job
            self._job = kind_of(job)
            self._has_uneven_steps = isinstance(job, Generate) and job.sampling.step_cache_threshold > 0.0
            return self._start_phase(Phase.FIRST_STEP if isinstance(job, Generate) else Phase.END)
        if isinstance(command, Prepare):
            self._sizes[command.component_id] = command.manifest.tensor_bytes
        size_bytes = self._sizes.get(getattr(command, "component_id", ""), 0)
        if isinstance(command, Unmap):
            self._sizes.pop(command.component_id, None)
        elif isinstance(command, Plug):
            size_bytes = 0  # nothing is read
        return self._lend_s + size_bytes / limits.SLOWEST_BYTES_PER_S

    def step(self, step: int, total_steps: int) -> float:
        """Note that a step is done; returns the seconds until the next report is overdue."""
        took_s = self._end_phase()
        if step >= total_steps:
            return self._start_phase(Phase.END)
        deadline_s = self._start_phase(Phase.STEP)
        if step == 1 and (self._job, Phase.STEP) not in self._samples:
            # The first step does all that a later one does, and more.
            deadline_s = self._clamp(took_s)
        if self._has_uneven_steps:
            # The step cache skips most steps, but may compute any in full, like the first one.
            deadline_s = self._clamp(statistics.median(self._samples[self._job, Phase.FIRST_STEP]))
        return deadline_s

    def frames(self, frames: int, total_frames: int) -> float:
        """Note that frames of a video are decoded; returns the seconds until the next report is overdue."""
        self._end_phase()
        return self._start_phase(Phase.LAST if frames >= total_frames else Phase.FRAMES)

    def end(self) -> None:
        """Note that every rank has done the command."""
        if self._phase is not None:
            self._end_phase()

    def discard(self) -> None:
        """Note that the command failed or was cancelled: its duration is not a measurement."""
        self._phase = None

    def _start_phase(self, phase: Phase) -> float:
        self._phase, self._since_s = phase, self._now_s()
        samples = self._samples.get((self._job, phase))
        return self._hang_s if samples is None else self._clamp(statistics.median(samples))

    def _end_phase(self) -> float:
        took_s = self._now_s() - self._since_s
        key = (self._job, self._phase)
        self._samples.setdefault(key, deque(maxlen=_KEPT_SAMPLES)).append(took_s)
        self._samples.move_to_end(key)
        while len(self._samples) > _KEPT_KINDS:
            self._samples.popitem(last=False)
        self._phase = None
        return took_s

    def _clamp(self, typical_s: float) -> float:
        return min(self._hang_s, max(self._step_s, FACTOR * typical_s))


def kind_of(job: InferenceRequest) -> Hashable:
    """Return a key of what determines how long a job's steps take: components, LoRAs, ControlNets, shapes and sizes."""
    found: list[Hashable] = [type(job)]
    for name in job.__struct_fields__:  # msgspec.structs.fields would resolve the types again each time
        value = getattr(job, name)
        if isinstance(value, IoTensor):
            found.append((name, value.dtype, value.shape))
        elif name.endswith("_id") and name != "request_id":
            found.append((name, value))
    found.append(tuple(sorted(use.component_id for use in _loras_of(job))))
    if isinstance(job, Generate):
        sampling = job.sampling
        found += sorted(job.components.items())
        found.append((sampling.height, sampling.width, sampling.frames, sampling.step_cache_threshold > 0.0))
        found.append(tuple(control.component_id for control in job.controls))
        found += _shapes(job.conditioning)
    elif isinstance(job, Call):
        for number, part in enumerate(job.parts):
            found += [number, *_shapes(part.arguments), *(control.component_id for control in part.controls)]
    return tuple(found)


def _loras_of(job: InferenceRequest) -> Iterable[LoraUse]:
    loras: dict[str, LoraUses] | LoraUses = getattr(job, "loras", ())
    return itertools.chain.from_iterable(loras.values()) if isinstance(loras, dict) else loras


def _shapes(tree: dict[str, Argument]) -> Iterator[Hashable]:
    return ((path, tensor.dtype, tensor.shape) for path, tensor in arguments.tensors(tree))


class CommandDeadline:
    """Call ``on_missed(silent_s)`` once the next report of the running command is overdue.

    Each report extends the deadline by what :class:`LearnedDurations` allows. One timer serves all commands.
    """

    def __init__(self, loop: EventLoop, durations: LearnedDurations, on_missed: Callable[[float], None]) -> None:
        self._durations = durations
        self._on_missed = on_missed
        self._deadline = Deadline(loop, self._missed)
        self._is_running = False
        self._is_cancelled = False

    @property
    def overdue_s(self) -> float:
        """How long the running command has exceeded its deadline; 0 before it, and between commands."""
        return self._deadline.overdue_s if self._is_running else 0.0

    def begin(self, command: AnyCommand) -> None:
        self._is_running, self._is_cancelled = True, False
        self._deadline.extend(self._durations.begin(command))

    def step_reached(self, step: StepReached) -> None:
        self._extend(self._durations.step(step.step, step.total_steps))

    def frames_reached(self, reached: FramesReached) -> None:
        self._extend(self._durations.frames(reached.frames, reached.total_frames))

    def _extend(self, deadline_s: float) -> None:
        if not self._is_cancelled:
            self._deadline.extend(deadline_s)

    def cancelled(self) -> None:
        """The job was cancelled: further steps and frames do not extend its deadline."""
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
