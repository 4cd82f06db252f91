"""Hello, lend, run, status, return: the way that every job takes."""

from __future__ import annotations

import hashlib
from typing import Any

from xditd.ipc.degrees import Degrees
from xditd.ipc.replies import CanarySeen, Decoded, Generated, LogLines, Returned, StepDone
from xditd.ipc.requests import CheckCanary, Decode, GetLogs, ReturnLoan
from xditd.ipc.status import GroupState, LeaseState
from xditd.ipc.tensors import IoTensor


def test_lend_run_return(start_daemon: Any, memory: Any) -> None:
    daemon = start_daemon()
    client = daemon.client()
    lent = client.lend(memory.manifest())
    assert lent.family == "fake"
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


def test_canary_is_read_by_every_rank_in_the_clients_memory(client: Any, memory: Any) -> None:
    seen = client.ask(CheckCanary(request_id="", io=memory.block, offset_bytes=8, length_bytes=16), CanarySeen)
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


def test_tensors_outside_the_io_block_are_refused(client: Any, memory: Any) -> None:
    vae = client.lend(memory.manifest(kind="vae"))
    inside = IoTensor(offset_bytes=0, dtype="float32", shape=(4,))
    outside = IoTensor(offset_bytes=memory.block.size_bytes - 8, dtype="float32", shape=(4,))
    failed = client.fail(Decode(request_id="", vae_id=vae.component_id, io=memory.block, latents=inside, out=outside))
    assert failed.code == "bad_request"
    assert "out ends at byte 4104" in failed.detail
