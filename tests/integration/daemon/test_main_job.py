"""Hello, lend, run, status, return: the way that every job takes."""

from __future__ import annotations

import hashlib
from typing import Any

from xditd.ipc.replies import CanarySeen, Generated, Returned, StepDone
from xditd.ipc.requests import CheckCanary, ReturnLoan
from xditd.ipc.status import GroupState, LeaseState


def test_lend_run_return(daemon: Any, memory: Any) -> None:
    client = daemon.client()
    lent = client.lend(memory.manifest())
    assert lent.family == "fake"
    assert lent.copied.host_to_host == 200  # summed over both ranks
    assert lent.timings_ms["map"] == 2.0  # the slower rank's
    job = client.send(memory.generate(lent.component_id, steps=3))
    done = client.wait(job)
    assert isinstance(done, Generated), done
    assert done.timings_ms == {"steps": 3.0}
    assert [event.step for event in client.events if isinstance(event, StepDone)] == [1, 2, 3]
    status = client.status()
    assert status.group_state is GroupState.READY
    assert (status.world_size, status.device_kind, status.parallel) == (2, "cpu", {"ulysses": 2})
    (component,) = status.components
    assert (component.state, component.component_id) == (LeaseState.LENT, lent.component_id)
    assert (status.counters.jobs_done, status.counters.group_starts, status.counters.plugs) == (1, 1, 1)
    assert status.last_job_ms["steps"] == 3.0
    assert status.clients == 1
    client.ask(ReturnLoan(request_id="", component_id=lent.component_id), Returned)
    after = client.status()
    assert after.components == ()
    assert [worker.loaded for worker in after.workers] == [0, 0]


def test_canary_is_read_by_every_rank_in_the_clients_memory(daemon: Any, memory: Any) -> None:
    client = daemon.client()
    seen = client.ask(CheckCanary(request_id="", io=memory.block, offset_bytes=8, length_bytes=16), CanarySeen)
    assert seen.digests == (hashlib.blake2b(b"weights!" * 2, digest_size=16).digest(),) * 2
