from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import msgspec
import pytest

from xditd.daemon.groups.deadlines import FACTOR, CommandDeadline, LearnedDurations, kind_of
from xditd.daemon.operations.event_loop import EventLoop
from xditd.ipc import limits
from xditd.ipc.arguments import InIo, Kept
from xditd.ipc.job_parts import Control, LoraUse, Part, Sampling
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import Call, Decode, Generate
from xditd.ipc.tensors import ComponentKind, Fingerprint, HostShmBlock, IoTensor, Manifest, TensorSpec
from xditd.ipc.worker_messages import ForgetClient, Plug, Prepare, Run, StepReached, Unmap

HANG_S, STEP_S, LEND_S = 300.0, 10.0, 60.0
EXPORTER = ProcessIdentity(pid=1, start_ticks=0)
BLOCK = HostShmBlock(fd=3, inode=1, size_bytes=2**40, fingerprint=Fingerprint(length_bytes=0, digest=bytes(16)))
TENSOR = IoTensor(offset_bytes=0, dtype="float32", shape=(1, 4))
TEXT = InIo(offset_bytes=0, dtype="float32", shape=(1, 4))
GENERATE = Generate(
    request_id="1",
    components={"transformer": "t"},
    io=BLOCK,
    conditioning={"prompt_embeds": TEXT},
    sampling=Sampling(height=64, width=64, steps=4),
    out_latents=TENSOR,
)


def sampled(**changes: Any) -> Generate:
    """The same generation with other sampling parameters."""
    return msgspec.structs.replace(GENERATE, sampling=msgspec.structs.replace(GENERATE.sampling, **changes))


class Clock:
    now_s = 1000.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def subject(clock: Clock) -> LearnedDurations:
    return LearnedDurations(
        hang_deadline_s=HANG_S, step_deadline_s=STEP_S, lend_deadline_s=LEND_S, now_s=lambda: clock.now_s
    )


@pytest.fixture
def run(subject: LearnedDurations, clock: Clock) -> Callable[..., list[float]]:
    """Run a job with a first step, steps and an end of so many seconds; returns each deadline."""

    def run(first_s: float, step_s: float, end_s: float, job: Generate = GENERATE) -> list[float]:
        found = [subject.begin(Run(op_number=1, job=job, exporter=EXPORTER))]
        for step in range(1, job.sampling.steps + 1):
            clock.now_s += first_s if step == 1 else step_s
            found.append(subject.step(step, job.sampling.steps))
        clock.now_s += end_s
        subject.end()
        return found

    return run


def test_first_job_is_given_time_and_then_its_own_steps_decide(run: Callable[..., list[float]]) -> None:
    assert run(5.0, 1.0, 2.0) == [HANG_S, FACTOR * 5.0, FACTOR * 1.0, FACTOR * 1.0, HANG_S]


def test_later_jobs_are_measured_against_earlier_ones(run: Callable[..., list[float]]) -> None:
    run(5.0, 1.0, 2.0)
    assert run(0.1, 0.1, 0.1) == [FACTOR * 5.0, *[FACTOR * 1.0] * 3, FACTOR * 2.0]


def test_short_steps_get_the_least_and_long_ones_the_most(run: Callable[..., list[float]]) -> None:
    run(0.01, 0.01, 0.01)
    assert run(0.01, 0.01, 0.01) == [STEP_S] * 5
    other = sampled(height=128)
    run(60.0, 60.0, 60.0, other)
    assert run(60.0, 60.0, 60.0, other) == [HANG_S] * 5


def test_another_shape_or_group_starts_without_experience(
    subject: LearnedDurations, run: Callable[..., list[float]]
) -> None:
    run(0.01, 0.01, 0.01)
    assert run(1.0, 1.0, 1.0, sampled(width=128))[0] == HANG_S
    subject.forget()
    assert run(1.0, 1.0, 1.0)[0] == HANG_S


def test_steps_that_a_cache_spares_do_not_hurry_those_that_are_computed(run: Callable[..., list[float]]) -> None:
    cached = sampled(step_cache_threshold=0.1)
    run(3.0, 0.01, 1.0, cached)
    assert run(3.0, 0.01, 1.0, cached)[1:4] == [FACTOR * 3.0] * 3
    assert run(1.0, 1.0, 1.0)[0] == HANG_S  # a job without the step cache is another kind


def test_kind_does_not_depend_on_what_costs_nothing() -> None:
    same = msgspec.structs.replace(sampled(seed=3, steps=50, guidance_scale=1.0), request_id="2")
    assert kind_of(same) == kind_of(GENERATE)
    kept = {"prompt_embeds": Kept(kept_id="k1", dtype="float32", shape=(1, 4))}
    assert kind_of(msgspec.structs.replace(GENERATE, conditioning=kept)) == kind_of(GENERATE)
    longer = {"prompt_embeds": msgspec.structs.replace(TEXT, shape=(2, 4))}
    assert kind_of(msgspec.structs.replace(GENERATE, conditioning=longer)) != kind_of(GENERATE)
    assert kind_of(msgspec.structs.replace(GENERATE, components={"transformer": "u"})) != kind_of(GENERATE)


def test_the_first_job_of_a_lora_is_given_time_and_its_strength_costs_nothing() -> None:
    def with_lora(component_id: str, strength: float) -> Hashable:
        use = LoraUse(component_id=component_id, strength=strength)
        return kind_of(msgspec.structs.replace(GENERATE, loras={"transformer": (use,)}))

    assert len({kind_of(GENERATE), with_lora("a", 0.5), with_lora("b", 0.5)}) == 3
    assert with_lora("a", 0.5) == with_lora("a", 1.0)


def test_the_first_job_of_a_controlnet_is_given_time() -> None:
    def with_control(component_id: str, scale: float) -> Hashable:
        control = Control(component_id=component_id, scale=scale, latents=TENSOR)
        return kind_of(msgspec.structs.replace(GENERATE, controls=(control,)))

    assert len({kind_of(GENERATE), with_control("a", 1.0), with_control("b", 1.0)}) == 3
    assert with_control("a", 1.0) == with_control("a", 0.5)


def test_calls_of_other_shapes_are_of_another_kind() -> None:
    def call(*shapes: tuple[int, ...]) -> Call:
        parts = tuple(Part(arguments={"x": msgspec.structs.replace(TEXT, shape=shape)}) for shape in shapes)
        return Call(request_id="1", component_id="t", io=BLOCK, parts=parts, out_offset_bytes=0, out_size_bytes=0)

    assert kind_of(call((1, 4))) == kind_of(call((1, 4)))
    assert len({kind_of(call((1, 4))), kind_of(call((2, 4))), kind_of(call((1, 4), (1, 4)))}) == 3


def test_chunks_of_a_video_are_measured_apart(subject: LearnedDurations, clock: Clock) -> None:
    def run_video() -> list[float]:
        found = [subject.begin(Run(op_number=1, job=GENERATE, exporter=EXPORTER))]
        for step in (1, 2):
            clock.now_s += 1.0
            found.append(subject.step(step, 2))
        for frames, seconds in ((1, 3.0), (5, 0.5), (9, 0.5)):
            clock.now_s += seconds
            found.append(subject.frames(frames, 9))
        clock.now_s += 2.0
        subject.end()
        return found

    assert run_video()[2:] == [HANG_S, HANG_S, FACTOR * 0.5, HANG_S]
    assert run_video()[2:] == [FACTOR * 3.0, FACTOR * 0.5, FACTOR * 0.5, FACTOR * 2.0]


def test_job_without_steps_is_one_phase(subject: LearnedDurations, clock: Clock) -> None:
    decode = Run(
        op_number=1, job=Decode(request_id="1", vae_id="v", io=BLOCK, latents=TENSOR, out=TENSOR), exporter=EXPORTER
    )
    assert subject.begin(decode) == HANG_S
    clock.now_s += 2.0
    subject.end()
    assert subject.begin(decode) == FACTOR * 2.0


def test_a_job_that_was_refused_or_cancelled_says_nothing_of_the_next_one(
    subject: LearnedDurations, clock: Clock, run: Callable[..., list[float]]
) -> None:
    job = Run(op_number=1, job=GENERATE, exporter=EXPORTER)
    subject.begin(job)
    clock.now_s += 0.01
    subject.discard()  # before its first step
    subject.begin(job)
    clock.now_s += 5.0
    subject.step(1, 4)
    clock.now_s += 0.01
    subject.discard()  # before its second one
    assert run(6.0, 1.0, 2.0) == [FACTOR * 5.0, FACTOR * 6.0, FACTOR * 1.0, FACTOR * 1.0, HANG_S]


def test_mapping_is_given_time_by_its_bytes(subject: LearnedDurations) -> None:
    count = 10 * limits.SLOWEST_BYTES_PER_S // 4
    manifest = Manifest(
        kind=ComponentKind.VAE,
        label="large",
        blocks=(BLOCK,),
        tensors=(TensorSpec("weight", "float32", (count,), 0, 0),),
        generation=0,
    )
    prepare = Prepare(op_number=1, component_id="c", manifest=manifest, exporter=EXPORTER)
    assert subject.begin(prepare) == LEND_S + 10
    assert subject.begin(Plug(op_number=2, component_id="c")) == LEND_S
    assert subject.begin(Unmap(op_number=3, component_id="c")) == LEND_S + 10
    assert subject.begin(Unmap(op_number=4, component_id="c")) == LEND_S
    assert subject.begin(ForgetClient(op_number=5, exporter=EXPORTER)) == LEND_S


GENERATION = Run(op_number=1, job=GENERATE, exporter=EXPORTER)


class Bench:
    """A command deadline of so many seconds, and the missed ones."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.allowed_s = 0.1
        self.silences: list[float] = []
        self.told_s: list[float] = []
        self.deadline = CommandDeadline(self.loop, self, self.missed)  # type: ignore[arg-type]
        self.began_s = time.monotonic()

    def begin(self, _: Any) -> float:
        return self.allowed_s

    def step(self, _: int, __: int) -> float:
        return self.allowed_s

    def end(self) -> None:
        pass

    forget = end

    def missed(self, silent_s: float) -> None:
        self.silences.append(silent_s)
        self.told_s.append(time.monotonic() - self.began_s)

    def report_step(self) -> None:
        self.deadline.step_reached(
            StepReached(group_token="token123", rank=0, op_number=1, step=1, total_steps=4, elapsed_s=0.0)
        )

    def run(self, seconds: float) -> None:
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run(lambda: None)


def test_silence_is_told_once_and_not_early() -> None:
    bench = Bench()
    bench.deadline.begin(GENERATION)
    bench.run(0.3)
    assert len(bench.silences) == 1
    assert bench.silences[0] >= 0.1


def test_steps_put_it_off_unless_the_job_was_cancelled() -> None:
    bench = Bench()
    bench.deadline.begin(GENERATION)
    bench.loop.call_later(0.06, bench.report_step)
    bench.run(0.4)
    assert len(bench.told_s) == 1
    assert bench.told_s[0] >= 0.16
    bench.deadline.begin(GENERATION)
    bench.deadline.cancelled()
    bench.allowed_s = 60.0
    bench.report_step()
    bench.run(0.3)
    assert len(bench.told_s) == 2


def test_next_deadline_may_be_shorter() -> None:
    bench = Bench()
    bench.allowed_s = 60.0
    bench.deadline.begin(GENERATION)
    bench.allowed_s = 0.1
    bench.report_step()
    bench.run(0.3)
    assert len(bench.told_s) == 1


def test_idle_or_ended_group_may_be_silent() -> None:
    bench = Bench()
    bench.deadline.begin(GENERATION)
    bench.deadline.answered(is_done=True)
    bench.run(0.2)
    bench.deadline.begin(GENERATION)
    bench.deadline.group_ended()
    bench.run(0.2)
    assert bench.silences == []
    assert bench.deadline.overdue_s == 0.0


def test_many_commands_leave_one_timer() -> None:
    bench = Bench()
    for _ in range(1_000):
        bench.allowed_s = 60.0
        bench.deadline.begin(GENERATION)
        bench.allowed_s = 10.0
        bench.report_step()
        bench.deadline.answered(is_done=True)
    assert len(bench.loop._timers) <= 2
