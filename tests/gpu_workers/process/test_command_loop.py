"""The command loop over a real socket, with an executor that only records its calls."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.process.command_loop import CommandLoop, DaemonChannel
from xditd.gpu_workers.process.executor import JobChannel, PreparedFacts, RankFacts
from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.codec import encode, report_decoder
from xditd.ipc.errors import BadRequest, Internal, XditdError
from xditd.ipc.outlines import Outline, OutlinedTensor
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.status import LayoutReport, MemoryParts
from xditd.ipc.tensors import CopiedBytes, FileDigest
from xditd.ipc.worker_messages import (
    AnyReport,
    BuildModel,
    CancelRun,
    Command,
    ComponentCopied,
    CopyComponent,
    Done,
    FilesDigested,
    ForgetClient,
    MemoryCounted,
    ModelBuilt,
    Plug,
    Plugged,
    RankFailed,
    RankReady,
    RankTally,
    Shutdown,
    Unmap,
    WarmUpModel,
)

TOKEN = "token-of-a-group"
CLIENT = ProcessIdentity(pid=1, start_ticks=2)


class _View:
    """Stands for a view of lent memory."""


class RecordingExecutor:
    """Notes its calls; ``failure`` is raised by the next one."""

    idle_wait_s = 0.05

    def __init__(self) -> None:
        layout = LayoutReport(asked="auto", reason="one worker", candidates=())
        self.facts = RankFacts(1, 2, "cpu", "cpu", "", {"ulysses": 2}, layout, "SDPA", "bf16")
        self.calls: list[Any] = []
        self.failure: Exception | None = None
        self.digests: dict[str, tuple[FileDigest, ...]] = {}
        self.counted: MemoryParts | None = None

    def _record(self, *call: Any) -> None:
        self.calls.append(call)
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def while_idle(self) -> None:
        """There is no periodic work."""

    def take_digests(self) -> dict[str, tuple[FileDigest, ...]]:
        digests, self.digests = self.digests, {}
        return digests

    def take_memory(self) -> MemoryParts | None:
        counted, self.counted = self.counted, None
        return counted

    def prepare(self, command: Any) -> PreparedFacts:
        raise AssertionError("not asked for here")

    def build_model(self, outline: Outline) -> tuple[dict[str, float], bool]:
        self._record("build", outline.label)
        return {"build": 3.0}, True

    def warm_up_model(self, outline: Outline) -> dict[str, float]:
        self._record("warm_up", outline.label)
        return {"warm_up": 4.0}

    def plug(self, component_id: str) -> dict[str, float]:
        self._record("plug", component_id)
        return {"plug": 1.0}

    def copy_component(self, component_id: str) -> tuple[CopiedBytes, dict[str, float]]:
        self._record("keep", component_id)
        return CopiedBytes(host_to_host=7), {"copy": 2.0}

    def unmap(self, component_id: str, *, keeps_copies: bool = False) -> None:
        self._record("unmap", component_id)

    def forget(self, client: ProcessIdentity) -> None:
        self._record("forget", client)

    def digest_io(self, command: Any) -> bytes:
        raise AssertionError("not asked for here")

    def run(self, command: Any, job_channel: JobChannel) -> Finished:
        raise AssertionError("not asked for here")

    def tally(self) -> RankTally:
        return RankTally(loaded=3, models_built=1, models_reused=2, plugs=4)

    def after_answer(self) -> None:
        self.calls.append("after_answer")

    def explain(self, error: Exception) -> tuple[XditdError, bool]:
        return (error, False) if isinstance(error, XditdError) else (Internal(f"explained: {error}"), True)

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def executor() -> RecordingExecutor:
    return RecordingExecutor()


@pytest.fixture
def loop(executor: RecordingExecutor, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Start the loop in a thread, and be its daemon: ``send`` a command, ``receive`` a report, or ``ask`` for one."""
    runtime = RuntimeDir(tmp_path)
    context = zmq.Context()
    daemon = context.socket(zmq.ROUTER)
    daemon.setsockopt(zmq.LINGER, 0)
    daemon.bind(endpoint(runtime.worker_socket))
    ended: list[object] = []

    def serve() -> None:
        try:
            CommandLoop(DaemonChannel(runtime), executor, TOKEN).serve()
        except SystemExit as end:
            ended.append(end.code)

    thread = threading.Thread(target=serve)
    thread.start()
    assert daemon.poll(60_000), "the rank is not ready"
    routing_id, payload = daemon.recv_multipart()
    ready = report_decoder.decode(payload)
    assert isinstance(ready, RankReady)
    assert (ready.group_token, ready.rank, ready.world_size, ready.parallel) == (TOKEN, 1, 2, {"ulysses": 2})

    def send(command: Command) -> None:
        daemon.send_multipart([routing_id, encode(command)])

    def receive() -> AnyReport:
        assert daemon.poll(60_000), "no report"
        return report_decoder.decode(daemon.recv_multipart()[1])

    def ask(command: Command) -> AnyReport:
        send(command)
        return receive()

    yield SimpleNamespace(send=send, receive=receive, ask=ask, thread=thread, ended=ended)
    send(Shutdown(op_number=99))
    thread.join(timeout=60)
    assert not thread.is_alive()
    daemon.close()
    context.term()


def test_each_command_is_one_call_and_one_report(loop: SimpleNamespace, executor: RecordingExecutor) -> None:
    plugged = loop.ask(Plug(op_number=1, component_id="c1"))
    assert isinstance(plugged, Plugged)
    assert (plugged.op_number, plugged.timings_ms, plugged.tally) == (1, {"plug": 1.0}, executor.tally())
    outline = Outline(label="x", tensors=(OutlinedTensor("a", "bfloat16", (2,)),))
    built = loop.ask(BuildModel(op_number=7, outline=outline))
    assert isinstance(built, ModelBuilt)
    assert (built.timings_ms, built.has_warm_up) == ({"build": 3.0}, True)
    warmed = loop.ask(WarmUpModel(op_number=8, outline=outline))
    assert isinstance(warmed, Done)
    assert warmed.timings_ms == {"warm_up": 4.0}
    kept = loop.ask(CopyComponent(op_number=2, component_id="c1"))
    assert isinstance(kept, ComponentCopied)
    assert kept.copied == CopiedBytes(host_to_host=7)
    assert isinstance(loop.ask(Unmap(op_number=3, component_id="c1")), Done)
    assert isinstance(loop.ask(ForgetClient(op_number=4, exporter=CLIENT)), Done)
    asked = [call for call in executor.calls if call != "after_answer"]
    assert asked == [
        ("plug", "c1"),
        ("build", "x"),
        ("warm_up", "x"),
        ("keep", "c1"),
        ("unmap", "c1"),
        ("forget", CLIENT),
    ]


def test_a_refusal_is_answered_and_the_next_command_served(loop: SimpleNamespace, executor: RecordingExecutor) -> None:
    executor.failure = BadRequest("no such component", names=("a", "b"))
    failed = loop.ask(Plug(op_number=1, component_id="c1"))
    assert isinstance(failed, RankFailed)
    assert (failed.op_number, failed.code, failed.detail) == (1, "bad_request", "no such component")
    assert (failed.is_fatal, failed.names) == (False, ("a", "b"))
    assert isinstance(loop.ask(Plug(op_number=2, component_id="c1")), Plugged)


def test_a_refusal_keeps_no_frames(loop: SimpleNamespace, executor: RecordingExecutor) -> None:
    """They view lent memory, which the next command may unmap before the garbage collector runs."""
    seen: list[weakref.ref[Any]] = []

    def refuse(*_: Any) -> None:
        view = _View()
        seen.append(weakref.ref(view))
        error = BadRequest(f"this frame has the error and a {type(view).__name__}")
        raise error from ValueError("a cause")

    executor._record = refuse  # type: ignore[method-assign]
    gc.disable()
    try:
        assert isinstance(loop.ask(Plug(op_number=1, component_id="c1")), RankFailed)
        assert isinstance(loop.ask(Plug(op_number=2, component_id="c1")), RankFailed)  # the first is dealt with
        assert seen[0]() is None
    finally:
        gc.enable()
        del executor._record


def test_a_fatal_error_ends_the_rank(loop: SimpleNamespace, executor: RecordingExecutor) -> None:
    executor.failure = ZeroDivisionError("by zero")
    failed = loop.ask(Plug(op_number=1, component_id="c1"))
    assert isinstance(failed, RankFailed)
    assert (failed.code, failed.detail, failed.is_fatal) == ("internal", "explained: by zero", True)
    loop.thread.join(timeout=60)
    assert loop.ended == [1]


def test_a_late_cancel_is_ignored(loop: SimpleNamespace, executor: RecordingExecutor) -> None:
    loop.send(CancelRun(op_number=1, target_op_number=1))
    done = loop.ask(Unmap(op_number=2, component_id="c1"))
    assert isinstance(done, Done)
    assert done.op_number == 2
    assert [call for call in executor.calls if call != "after_answer"] == [("unmap", "c1")]


def test_digests_are_sent_while_the_rank_is_idle(loop: SimpleNamespace, executor: RecordingExecutor) -> None:
    digest = FileDigest(block=0, ctime_ns=5, digest=bytes(16))
    executor.digests = {"c1": (digest,)}
    told = loop.receive()
    assert isinstance(told, FilesDigested)
    assert (told.component_id, told.digests) == ("c1", (digest,))


def test_a_count_of_the_memory_is_sent_once(loop: SimpleNamespace, executor: RecordingExecutor) -> None:
    executor.counted = MemoryParts(weights_bytes=7, reserve_bytes=3)
    told = loop.receive()
    assert isinstance(told, MemoryCounted)
    assert (told.rank, told.memory.by_part["weights"], told.memory.beyond_weights_bytes) == (1, 7, 3)
    assert isinstance(loop.ask(Unmap(op_number=1, component_id="c1")), Done)
