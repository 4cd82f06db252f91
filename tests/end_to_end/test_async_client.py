"""The client for event loops, on a daemon with two workers: results, cancellation, and what is left afterwards."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running_daemon import RunningDaemon, until, until_empty

from xditd.client import (
    AsyncClient,
    BadRequest,
    Cancelled,
    Client,
    Closed,
    DaemonUnreachable,
    StepDone,
    XditdError,
)
from xditd.client.async_client import MAX_AT_ONCE

TASKS = 100


@pytest.fixture
def opened(daemon: RunningDaemon) -> Callable[..., AsyncClient]:
    return lambda **options: AsyncClient(daemon.runtime_dir, **options)


@pytest.fixture(autouse=True)
def nothing_is_left(daemon: RunningDaemon) -> Any:
    """No thread of the client, no job and no loan."""
    yield
    gc.collect()
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("xditd-async")], "threads to end")
    with daemon.connect() as client:
        until_empty(client)


def generation(inputs: Any, **more: Any) -> dict[str, Any]:
    return {"noise": inputs.noise, "height": inputs.pixels, "width": inputs.pixels, "steps": 4, **more}


def test_it_gives_what_the_client_gives(
    opened: Callable[..., AsyncClient], daemon: RunningDaemon, files: SimpleNamespace, make_inputs: Any
) -> None:
    inputs = make_inputs()

    async def run() -> tuple[torch.Tensor, list[int], str]:
        async with opened(name="loop") as client:
            loan = await client.lend(files.transformer)
            vae = await client.lend(files.vae)
            job = await client.generate(loan, inputs.conditioning, vae=vae, **generation(inputs))
            steps = [event.step async for event in job if isinstance(event, StepDone)]
            result = await job.result()
            assert await job.result() is result
            again = await client.decode(vae, result.latents, transformer=loan)
            torch.testing.assert_close(again, result.image, rtol=0, atol=1e-5)
            assert (await client.facts(loan)).family == loan.family
            assert {each.component_id for each in (await client.status()).components} >= {loan.component_id}
            await client.run(vae.return_)
            assert not vae.is_live
            return result.latents, steps, repr(job)

    latents, steps, text = asyncio.run(run())
    with daemon.connect() as client:
        job = client.generate(client.lend(files.transformer), inputs.conditioning, **generation(inputs))
        assert torch.equal(job.result().latents, latents)
    assert steps == [1, 2, 3, 4]
    assert text.startswith("<AsyncGenerationJob ")


def test_a_hundred_tasks_get_their_own_results(
    opened: Callable[..., AsyncClient], daemon: RunningDaemon, files: SimpleNamespace, make_inputs: Any
) -> None:
    seeds = range(4)

    async def run() -> list[torch.Tensor]:
        async with opened() as client:
            loan = await client.lend(files.transformer)

            async def one(number: int) -> torch.Tensor:
                inputs = make_inputs(seed=number % len(seeds), pixels=64)
                job = await client.generate(loan, inputs.conditioning, **generation(inputs, steps=1))
                return (await job.result()).latents

            waiting = [one(number) for number in range(TASKS)]
            found: list[torch.Tensor] = []
            while waiting:  # the daemon's queue is bounded
                found += await asyncio.gather(*waiting[:16])
                waiting = waiting[16:]
            return found

    found = asyncio.run(run())
    assert len(found) == TASKS
    for number, latents in enumerate(found):
        assert torch.equal(latents, found[number % len(seeds)])
    assert not torch.equal(found[0], found[1])


def test_cancelled_tasks_cancel_their_jobs(
    opened: Callable[..., AsyncClient], daemon: RunningDaemon, files: SimpleNamespace, make_inputs: Any
) -> None:
    """At random moments: before a job is sent, while it waits, while it runs; and lends."""
    order = random.Random(0)
    inputs = make_inputs(pixels=64)

    async def run() -> int:
        async with opened() as client:
            loan = await client.lend(files.transformer)

            async def job() -> None:
                started = await client.generate(loan, inputs.conditioning, **generation(inputs, steps=30))
                async for _ in started:
                    pass
                await started.result()

            async def lend() -> None:
                other = await client.lend(files.vae)
                await client.run(other.return_)

            ended = 0
            for _ in range(6):
                tasks = [asyncio.create_task(order.choice((job, job, lend))()) for _ in range(8)]
                await asyncio.sleep(order.uniform(0.0, 0.4))
                for task in tasks:
                    task.cancel()
                ended += sum(
                    isinstance(each, asyncio.CancelledError)
                    for each in await asyncio.gather(*tasks, return_exceptions=True)
                )
            # The workers serve on, and no job of before runs.
            started = await client.generate(loan, inputs.conditioning, **generation(inputs, steps=1))
            await started.result()
            with daemon.connect() as other:
                await asyncio.to_thread(until_empty, other, loan.component_id)
            return ended

    assert asyncio.run(run()) > 20


def test_a_cancelled_return_that_had_not_begun_is_made(opened: Callable[..., AsyncClient], files: Any) -> None:
    """Its caller has usually dropped the loan by then, as with ``return_`` in a ``finally``."""

    async def run() -> None:
        async with opened(at_once=1) as client:
            for returns in (client.return_, lambda loan: client.run(loan.return_)):
                loan = await client.lend(files.vae)
                others = threading.Event()
                running = asyncio.create_task(client.run(others.wait))
                returning = asyncio.create_task(returns(loan))
                await asyncio.sleep(0)  # both tasks begin; the only thread runs the first one's function
                returning.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await returning
                others.set()
                await running
                status = await client.status()  # asked by the same thread, after the return
                assert not [each.label for each in status.components]

    asyncio.run(run())


def test_a_task_that_is_cancelled_among_events_leaves_a_job_that_says_so(
    opened: Callable[..., AsyncClient], files: SimpleNamespace, make_inputs: Any
) -> None:
    inputs = make_inputs(pixels=64)

    async def run() -> None:
        async with opened() as client:
            loan = await client.lend(files.transformer)
            job = await client.generate(loan, inputs.conditioning, **generation(inputs, steps=200))
            seen = asyncio.Event()

            async def watch() -> None:
                async for _ in job:
                    seen.set()

            task = asyncio.create_task(watch())
            await seen.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(Cancelled):
                await job.result()
            async with await client.generate(loan, inputs.conditioning, **generation(inputs, steps=200)) as other:
                pass
            with pytest.raises(Cancelled):
                await other.result()

    asyncio.run(run())


def test_a_loop_that_is_closed_in_mid_job_leaves_nothing(
    opened: Callable[..., AsyncClient], files: SimpleNamespace, make_inputs: Any
) -> None:
    inputs = make_inputs(pixels=64)
    loop = asyncio.new_event_loop()

    async def run(client: AsyncClient) -> None:
        await client.__aenter__()
        loan = await client.lend(files.transformer)
        job = await client.generate(loan, inputs.conditioning, **generation(inputs, steps=500))
        asyncio.get_running_loop().call_later(0.3, asyncio.get_running_loop().stop)
        await job.result()

    task = loop.create_task(run(opened()))
    loop.run_forever()
    assert not task.done()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio warns of the task, which is meant
    loop.close()
    del task
    gc.collect()


def test_errors_are_those_of_the_client(opened: Callable[..., AsyncClient], tmp_path: Any, files: Any) -> None:
    async def run() -> None:
        async with opened() as client:
            with pytest.raises(XditdError, match="no-such"):
                await client.lend(tmp_path / "no-such.safetensors")
            with pytest.raises(BadRequest):
                await client.generate(await client.lend(files.vae), {})
        await client.close()
        with pytest.raises(Closed):
            await client.status()
        with pytest.raises(Closed):
            await client.run(int)

    asyncio.run(run())
    with pytest.raises(BadRequest, match="at_once"):
        AsyncClient(at_once=0)

    async def connect() -> None:
        async with AsyncClient(tmp_path):
            pass

    with pytest.raises(DaemonUnreachable):
        asyncio.run(connect())


def test_it_has_the_surface_of_the_client() -> None:
    """What is added to the client is added here, too."""
    others = {"daemon_pid", "deadline_s", "check_canary"}  # the last one is an old name
    public = {name for name in dir(Client) if not name.startswith("_")} - others
    assert public - set(dir(AsyncClient)) == set()
    assert AsyncClient.decode.__doc__ == Client.decode.__doc__
    assert MAX_AT_ONCE >= TASKS
