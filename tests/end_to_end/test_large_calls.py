"""Calls beyond what room and memory were meant for: results larger than the sample, and more kept than workers keep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import Any

import pytest
import torch

from xditd.client import BadRequest, Client, Loan, OutOfMemory, RowsOf
from xditd.client.jobs import runner
from xditd.gpu_workers.jobs.job_io import PROVIDED_PER_CLIENT
from xditd.ipc import limits

pytestmark = pytest.mark.slow
SCALE = torch.tensor([0.5, -1.0, 2.0, 0.25])
MIB = 2**20
SAMPLE = (1, 4, 2048, 2048)
"""64 MiB in float32: four of them are all that is kept of a client."""
SLACK = 40
"""MiB by which a process may differ; less than one of these."""


@pytest.fixture
def daemon(package_daemon) -> Any:
    """Its forwards take no time and give as much as they are told."""
    return package_daemon


@pytest.fixture
def client(daemon) -> Iterator[Client]:
    with daemon.connect() as connected:
        yield connected


@pytest.fixture
def scale(client) -> Loan:
    return client.lend({"scale.weight": SCALE}, kind="transformer", label="scale")


def expected(sample: torch.Tensor, prompt: torch.Tensor, times: int = 1) -> torch.Tensor:
    return (sample * SCALE[:, None, None] + prompt[:, :, None, None]).repeat(1, 1, 1, times)


def part(number: int, times: int = 1) -> dict[str, Any]:
    """Arguments of a forward, 6 KiB of sample, that differ with the number."""
    generator = torch.Generator().manual_seed(number)
    return {
        "sample": torch.randn(2, 4, 12, 16, generator=generator),
        "prompt": torch.randn(2, 4, generator=generator),
        "times": times,
    }


def segments(client: Client, processes: Any) -> list[set[str]]:
    """What each worker has mapped of shared memory, but for this process's."""
    own = processes.memfds(os.getpid())
    return [processes.memfds(worker.pid) - own for worker in client.status().workers]


@pytest.mark.long
def test_results_larger_than_the_sample_are_right_and_what_held_them_is_bounded(client, daemon, scale, processes):
    before = segments(client, processes)
    for number in range(3 * PROVIDED_PER_CLIENT):
        given = part(number, times=40)
        (found,) = client.call(scale, given)
        assert torch.equal(found, expected(**given))
    grown = [now - then for now, then in zip(segments(client, processes), before, strict=True)]
    assert [len(each) for each in grown] == [PROVIDED_PER_CLIENT, 0]
    given = part(99)
    (found,) = client.call(scale, given)  # one that fits needs none of it
    assert torch.equal(found, expected(**given))
    with pytest.raises(BadRequest, match="times: 0, use a whole number above 0"):
        client.call(scale, part(0, times=0))


@pytest.mark.long
def test_parts_of_any_size_come_back_together(client, scale):
    """One of them alone is larger than the room that was offered for all."""
    parts = [part(0), part(1, times=300), part(2, times=2), part(3)]
    found = client.call_parts(scale, parts)
    for (result,), given in zip(found, parts, strict=True):
        assert torch.equal(result, expected(**given))


def test_results_that_were_pushed_out_before_they_were_read_are_asked_for_again(client, scale, monkeypatch):
    """The workers keep few such blocks, and calls of other threads come in between."""
    answered, others_are_done = Event(), Event()
    read = runner._read_from

    def read_late(*given: Any) -> Any:
        if not answered.is_set():
            answered.set()
            others_are_done.wait(60)
        return read(*given)

    monkeypatch.setattr(runner, "_read_from", read_late)
    done = client.status().counters.jobs_done
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(client.call, scale, part(0, times=40))
        assert answered.wait(60)
        for number in range(1, PROVIDED_PER_CLIENT + 1):
            given = part(number, times=40)
            assert torch.equal(client.call(scale, given)[0], expected(**given))
        others_are_done.set()
        assert torch.equal(late.result(60)[0], expected(**part(0, times=40)))
    assert client.status().counters.jobs_done == done + PROVIDED_PER_CLIENT + 2


def test_results_of_many_threads_are_their_own(client, scale):
    threads = 4 * PROVIDED_PER_CLIENT
    together = Barrier(threads)

    def ask(number: int) -> bool:
        given = part(number, times=100)
        right = expected(**given)
        together.wait(60)
        return all(torch.equal(client.call(scale, given)[0], right) for _ in range(20))

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(ask, range(threads)))


@pytest.mark.long
def test_more_bytes_than_workers_keep_give_right_results_in_bounded_memory(daemon, processes, wait_until):
    prompt = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    base = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    with daemon.connect() as client:
        scale = client.lend({"scale.weight": SCALE}, kind="transformer")
        pids = [worker.pid for worker in client.status().workers]

        def check(*numbers: int) -> int:
            """Run forwards on kept samples; return how many requests named one that was not kept any more."""
            before = client.status().counters.jobs_failed
            found = client.call_parts(scale, [{"sample": kept[number], "prompt": prompt} for number in numbers])
            for number, (result,) in zip(numbers, found, strict=True):
                assert torch.equal(result, expected(base + number, prompt))
            return client.status().counters.jobs_failed - before

        def grown() -> list[float]:
            return [
                (processes.memory_bytes(pid, "RssAnon") - then) / MIB for pid, then in zip(pids, before, strict=True)
            ]

        before = [processes.memory_bytes(pid, "RssAnon") for pid in pids]
        kept = [client.keep(base + number) for number in range(6)]
        most = limits.MAX_KEPT_BYTES / MIB
        assert [check(number) for number in range(6)] == [0] * 6
        # A rank frees its result after its answer.
        wait_until(
            lambda: all(most - SLACK <= each <= most + SLACK for each in grown()), "only what is kept to be left"
        )
        assert [check(number) for number in (5, 0, 5)] == [0, 1, 0]
        assert check(*range(5)) == 1  # more than the bound in one request
        wait_until(lambda: all(each <= most + SLACK for each in grown()), "what is no longer kept to be freed")
    wait_until(lambda: all(each <= SLACK for each in grown()), "what was kept of a client that is gone to be freed")


def test_more_tensors_than_workers_keep(client, scale):
    """Texts for 40 images a forward, each of them kept."""
    prompts = [client.keep(torch.full((1, 4), float(number))) for number in range(limits.MAX_KEPT_TENSORS + 64)]
    sample = torch.randn(40, 4, 2, 2)
    parts = [
        {"sample": sample, "prompt": RowsOf([(prompt, 1) for prompt in prompts[start : start + 40]])}
        for start in range(0, len(prompts), 40)
    ]
    right = [expected(sample, torch.arange(start, start + 40.0)[:, None].expand(-1, 4)) for start in range(0, 320, 40)]

    def failures(first: int) -> int:
        before = client.status().counters.jobs_failed
        for (found,), each in zip(client.call_parts(scale, parts[first:]), right[first:], strict=True):
            assert torch.equal(found, each)
        return client.status().counters.jobs_failed - before

    assert [failures(0), failures(2), failures(0), failures(0)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ({7: 1}, "times: key: 7 is of type int, use a string"),
        ({str(number): 1 for number in range(300)}, "times: {'0': 1, .* use a whole number above 0"),
        ([1] * 70_000, r"times\[1021\]: one forward takes 1024 values in total"),
    ],
    ids=["number as a key", "many keys", "long list"],
)
def test_arguments_of_any_form_are_answered(times, says, client, scale):
    with pytest.raises(BadRequest, match=says):
        client.call(scale, {**part(0), "times": times}, deadline_s=60)
    assert torch.equal(client.call(scale, part(0))[0], expected(**part(0)))


@pytest.mark.long
def test_results_larger_than_any_memory_are_a_typed_error(client, scale):
    """No rank has room: the group is rebuilt, maps the loan again, and is sent again what it kept."""
    given = part(0)
    kept = {**given, "sample": client.keep(given["sample"])}
    assert torch.equal(client.call(scale, kept)[0], expected(**given))
    starts = client.status().counters.group_starts
    with pytest.raises(OutOfMemory, match=r"no room on the worker's device.*use a smaller size or batch"):
        client.call(scale, {**kept, "times": 10**12})
    assert torch.equal(client.call(scale, kept)[0], expected(**given))
    assert client.status().counters.group_starts == starts + 1
