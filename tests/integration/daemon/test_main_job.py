"""The usual sequence of requests: hello, lend, run, status, return."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from xditd.ipc import limits
from xditd.ipc.arguments import Argument, InIo, ListOf, Repeated, Rows, TupleOf, Values
from xditd.ipc.degrees import Degrees
from xditd.ipc.replies import Called, Decoded, FramesDecoded, Generated, LogLines, MemoryChecked, Returned, StepDone
from xditd.ipc.requests import CheckMemory, Decode, GetLogs, ReturnLoan
from xditd.ipc.status import GroupState, LeaseState
from xditd.ipc.tensors import IoTensor


def test_frames_of_a_video_are_told_after_the_steps(start_daemon: Any, memory: Any) -> None:
    client = start_daemon().client()
    lent = client.lend(memory.manifest())
    job = memory.generate(lent.component_id, steps=2)
    client.ask(replace(job, sampling=replace(job.sampling, frames=9)), Generated)
    told = [each for each in client.events if isinstance(each, StepDone | FramesDecoded)]
    assert [type(each) for each in told] == [StepDone, StepDone, FramesDecoded, FramesDecoded]
    assert [(each.frames, each.total_frames) for each in told[2:]] == [(5, 9), (9, 9)]


def test_lend_run_return(start_daemon: Any, memory: Any) -> None:
    daemon = start_daemon()
    client = daemon.client()
    lent = client.lend(memory.manifest())
    assert lent.facts.family == "fake"
    assert lent.copied.host_to_host == 200  # summed over both ranks
    assert lent.timings_ms["map"] == 2.0  # the slower rank's
    done = client.ask(memory.generate(lent.component_id, steps=3), Generated)
    assert done.timings_ms == {"steps": 3.0}
    assert [event.step for event in client.events if isinstance(event, StepDone)] == [1, 2, 3]
    status = client.status()
    assert status.group_state is GroupState.READY
    assert (status.world_size, status.device_kind, status.parallel) == (2, "cpu", Degrees(ulysses=2).named())
    (component,) = status.components
    assert (component.state, component.component_id) == (LeaseState.LENT, lent.component_id)
    assert (status.counters.jobs_done, status.counters.group_starts, status.counters.plugs) == (1, 1, 1)
    assert status.last_job_ms["steps"] == 3.0
    assert status.clients == 1
    client.ask(ReturnLoan(request_id="", component_id=lent.component_id), Returned)
    after = client.status()
    assert after.components == ()
    assert [worker.loaded for worker in after.workers] == [0, 0]


def test_log_tells_what_a_user_wants_to_know(start_daemon: Any, memory: Any) -> None:
    daemon = start_daemon()
    client = daemon.client()
    client.lend(memory.manifest(label="flux\nforged line"))
    logs = client.ask(GetLogs(request_id=""), LogLines)
    text = "\n".join(logs.lines)
    assert "2 workers ready, 0 loaded, 2 deferred device=cpu parallel=ulysses:2" in text
    assert "checkpoint recognised family=fake kind=transformer tensors=1" in text
    assert "loading is deferred" in text
    assert "nothing will be downloaded" in text
    assert "tier=host_shm shared=64 B copied=host_to_host:200 B" in text
    assert "fake leader start=1" in text  # the workers' own lines
    assert not [line for line in logs.lines if line.startswith("forged")]
    assert daemon.log.splitlines()[: len(logs.lines)] == list(logs.lines)
    again = client.ask(GetLogs(request_id="", after_line=logs.next_line), LogLines)
    assert "fake leader" not in "".join(again.lines)


def test_who_has_a_reply_finds_its_line_in_the_log(client: Any, memory: Any) -> None:
    lent = client.lend(memory.manifest())
    done = client.ask(memory.generate(lent.component_id, steps=1), Generated)
    logs = client.ask(GetLogs(request_id=""), LogLines)
    assert [line for line in logs.lines if f"request done op=generate request_id={done.request_id} " in line]


def test_shared_memory_is_read_by_every_rank_in_the_clients_memory(client: Any, memory: Any) -> None:
    seen = client.ask(CheckMemory(request_id="", io=memory.block, offset_bytes=8, length_bytes=16), MemoryChecked)
    assert seen.digests == (hashlib.blake2b(b"weights!" * 2, digest_size=16).digest(),) * 2


def test_vae_work_takes_a_vae(client: Any, memory: Any) -> None:
    tensor = IoTensor(offset_bytes=0, dtype="float32", shape=(4,))
    transformer = client.lend(memory.manifest())
    vae = client.lend(memory.manifest(kind="vae"))
    assert vae.component_id != transformer.component_id
    decode = Decode(request_id="", vae_id=vae.component_id, io=memory.block, latents=tensor, out=tensor)
    client.ask(decode, Decoded)
    wrong = Decode(request_id="", vae_id=transformer.component_id, io=memory.block, latents=tensor, out=tensor)
    failed = client.fail(wrong)
    assert failed.code == "bad_request"
    assert "a transformer where a vae is needed" in failed.detail


def test_a_call_is_answered_with_what_rank_0_gave(client: Any, memory: Any) -> None:
    lent = client.lend(memory.manifest())
    leaf = InIo(offset_bytes=64, dtype="float32", shape=(2, 2))
    called = client.ask(memory.call(lent.component_id, TupleOf(items=(leaf,)), ListOf(items=(leaf, 1))), Called)
    assert called.results == (TupleOf(items=(leaf,)), ListOf(items=(leaf, 1)))
    assert (called.block, called.provider, called.timings_ms) == (None, None, {"steps": 3.0})
    assert client.status().components[0].facts == lent.facts


def nested(levels: int) -> Argument:
    found: Argument = 1
    for _ in range(levels):
        found = ListOf(items=(found,))
    return found


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        (InIo(offset_bytes=4090, dtype="float32", shape=(4,)), "parts[0].result ends at byte 4106 of an I/O block"),
        (
            ListOf(items=(Rows(parts=(Repeated(tensor=InIo(offset_bytes=0, dtype="int64", shape=(600,))),)),)),
            "parts[0].result[0].rows[0] ends at byte 4800",
        ),
        (Values(dtype="float32", shape=(2, 2), values=(0.5,)), "parts[0].result: 1 values for the shape [2, 2]"),
        (
            nested(limits.MAX_ARGUMENT_DEPTH + 1),
            f"parts[0].result{'[0]' * limits.MAX_ARGUMENT_DEPTH} is nested deeper than",
        ),
        (ListOf(items=(ListOf(items=(1,) * 1000),) * 2), "parts[0].more than 1024 arguments in one tree"),
    ],
)
def test_arguments_that_no_rank_should_get_are_refused(client: Any, memory: Any, argument: Argument, says: str) -> None:
    component_id = client.lend(memory.manifest()).component_id
    failed = client.fail(memory.call(component_id, argument))
    assert (failed.code, says in failed.detail) == ("bad_request", True), failed.detail


def test_a_job_needs_its_components_and_room_for_its_results(client: Any, memory: Any) -> None:
    transformer, vae = client.lend(memory.manifest()), client.lend(memory.manifest(kind="vae"))
    job = memory.generate(transformer.component_id)
    for components, says in (
        ({}, "components: a transformer is required"),
        ({"transformer": vae.component_id}, "a vae where a transformer is needed"),
        ({"transformer": transformer.component_id, "vae": transformer.component_id}, "where a vae is needed"),
    ):
        assert says in client.fail(msgspec.structs.replace(job, components=components)).detail
    outside = InIo(offset_bytes=4096, dtype="float32", shape=(1,))
    failed = client.fail(msgspec.structs.replace(job, conditioning={"prompt_embeds": outside}))
    assert "conditioning.prompt_embeds ends at byte 4100" in failed.detail
    failed = client.fail(memory.call(transformer.component_id, None, out_offset_bytes=8))
    assert "out ends at byte 4104" in failed.detail
    assert "a vae where a transformer" in client.fail(memory.call(vae.component_id, None)).detail


def test_tensors_outside_the_io_block_are_refused(client: Any, memory: Any) -> None:
    vae = client.lend(memory.manifest(kind="vae"))
    inside = IoTensor(offset_bytes=0, dtype="float32", shape=(4,))
    outside = IoTensor(offset_bytes=memory.block.size_bytes - 8, dtype="float32", shape=(4,))
    failed = client.fail(Decode(request_id="", vae_id=vae.component_id, io=memory.block, latents=inside, out=outside))
    assert failed.code == "bad_request"
    assert "out ends at byte 4104" in failed.detail
