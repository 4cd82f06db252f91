"""Pipelines of long-lived programs: restarts of the daemon, idle and named unloading, threads and event loops."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flux1_words
import pipeline_folders as folders
import pytest
import torch
from running_daemon import RunningDaemon, until, until_empty
from safetensors.torch import load_file, save_file

from xditd.client import AsyncClient, BadCheckpoint, Cancelled, Client, Closed, LeaseLost, Pipeline, UnknownComponent
from xditd.client.pipeline import pipeline

GIVEN: dict[str, Any] = {"steps": 2, "seed": 1, "width": 96, "height": 64}
LONG: dict[str, Any] = {**GIVEN, "steps": 1000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.saved(folders.flux1(), tmp_path / "flux")


@pytest.fixture
def pipe(client: Client, folder: Path) -> Iterator[Pipeline]:
    with Pipeline.open(folder, client=client) as opened:
        yield opened


def run(pipe: Pipeline, **given: Any) -> torch.Tensor:
    return pipe(conditioning=folders.flux1_texts(), **{**GIVEN, **given}).generation.latents


@pytest.mark.long
@pytest.mark.slow
def test_a_restarted_daemon_gets_the_models_again(start_daemon: Callable[..., RunningDaemon], folder: Path) -> None:
    daemon = start_daemon(1)
    daemon.wait_ready()
    with Pipeline.open(folder, runtime_dir=daemon.runtime_dir) as pipe:
        before = run(pipe)
        daemon.stop()
        until(lambda: not pipe.is_loaded, "the client to notice")
        again = start_daemon(1, folder=daemon.runtime_dir.parent)
        again.wait_ready()
        assert torch.equal(run(pipe), before)
        assert pipe.is_loaded
        again.stop()


def test_unloading_by_hand_and_by_name(pipe: Pipeline, client: Client) -> None:
    before = run(pipe)
    assert {each.label for each in client.status().components} == {"flux/transformer", "flux/vae"}
    pipe.unload()
    assert not client.status().components
    assert not pipe.is_loaded
    assert torch.equal(run(pipe), before)
    assert client.unload("flux") == 2
    assert not client.status().components
    with pytest.raises(UnknownComponent, match="flux: no component is lent under this name; nothing is lent"):
        client.unload("flux")
    assert torch.equal(run(pipe), before)
    pipe.close()
    assert not client.status().components
    with pytest.raises(Closed, match="flux is closed"):
        run(pipe)
    client.status()  # which is its owner's


def test_a_call_whose_models_another_thread_returns_says_that_it_may_be_repeated(
    pipe: Pipeline, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(pipe)
    with pytest.raises(LeaseLost) as lost:
        run(pipe, steps=1000, on_progress=lambda _: pipe.unload())
    assert lost.value.retryable
    generate = client.generate
    unloads = iter((True, False))

    def unload_at_first(*given: Any, **more: Any) -> Any:
        job = generate(*given, **more)
        if next(unloads):
            pipe.unload()
        return job

    monkeypatch.setattr(client, "generate", unload_at_first)
    try:
        found = run(pipe)
    except LeaseLost as error:  # a step was done before; otherwise the call begins again by itself
        assert error.retryable  # noqa: PT017 (both may happen)
        found = run(pipe)
    assert torch.equal(found, before)
    assert next(unloads, None) is None


def test_a_file_that_was_replaced_after_it_was_lent_is_named_without_a_hash(pipe: Pipeline, folder: Path) -> None:
    made = pipe(conditioning=folders.flux1_texts(), **GIVEN)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    other = weights.with_suffix(".new")
    save_file({name: each + 1 for name, each in load_file(weights).items()}, other)
    other.replace(weights)
    files = made.record().model.files
    assert [(each.name, each.sample) for each in files["vae"]] == [(weights.name, None)]
    assert all(each.sample for each in files["transformer"])


def test_another_model_in_place_of_the_first_is_refused(pipe: Pipeline, folder: Path) -> None:
    """Such as schnell in place of dev, which would drop the guidance scale."""
    before = run(pipe)
    pipe.unload()
    weights, config = (folder / "transformer" / name for name in ("diffusion_pytorch_model.safetensors", "config.json"))
    save_file({name: each for name, each in load_file(weights).items() if "guidance" not in name}, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    with pytest.raises(BadCheckpoint, match="flux: the file of its transformer is of another model"):
        run(pipe, guidance=3.5)
    with Pipeline.open(folder, client=pipe.client) as again:
        assert again.facts.transformer is not None
        assert again.facts.transformer.guidance == "none"
        assert not torch.equal(run(again), before)


def test_a_loan_of_the_callers_is_not_lent_again(pipe: Pipeline, client: Client, tmp_path: Path) -> None:
    layer = folders.flux1_transformer().transformer_blocks[0].attn.to_q
    name = "transformer.transformer_blocks.0.attn.to_q.lora_"
    factors = {
        f"{name}A.weight": folders.rows(1, 4, layer.in_features),
        f"{name}B.weight": folders.rows(2, layer.out_features, 4),
    }
    save_file(factors, tmp_path / "style.safetensors")
    with client.lend_lora(tmp_path / "style.safetensors") as lora:
        run(pipe, loras=[(lora, 0.5)])
    with pytest.raises(LeaseLost) as lost:
        run(pipe, loras=[(lora, 0.5)])
    assert not lost.value.retryable


def test_a_call_that_begins_while_its_pipeline_is_closed_lends_nothing(
    pipe: Pipeline, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(*_: Any) -> None:
        pipe.close()

    monkeypatch.setattr(pipeline, "check_refused", close)  # after it was seen to be open
    with pytest.raises(Closed, match="pipeline flux is closed"):
        run(pipe)
    assert not client.status().components


def test_an_idle_pipeline_returns_its_models(client: Client, folder: Path) -> None:
    with Pipeline.open(folder, client=client, keep_alive=0.2) as pipe:
        before = run(pipe)
        until(lambda: not pipe.is_loaded and not client.status().components, "the models to be returned")
        assert torch.equal(run(pipe), before)


def test_futures_and_their_cancellation(pipe: Pipeline) -> None:
    texts = folders.flux1_texts()
    right = run(pipe)
    futures = [pipe.submit(conditioning=texts, **{**GIVEN, "seed": 1 + number % 2}) for number in range(6)]
    found = [each.result(timeout=60).generation.latents for each in futures]
    assert all(torch.equal(each, right) for each in found[::2])
    assert not any(torch.equal(each, right) for each in found[1::2])
    started = threading.Event()
    long = pipe.submit(conditioning=texts, on_progress=lambda _: started.set(), **LONG)
    assert started.wait(60)
    long.cancel()
    with pytest.raises(Cancelled):
        long.result(timeout=60)
    assert torch.equal(run(pipe), right)


def test_an_event_loop(pipe: Pipeline, client: Client) -> None:
    texts = folders.flux1_texts()
    right = run(pipe)

    async def all_of_it() -> list[torch.Tensor]:
        many = await asyncio.gather(*(pipe.run_async(conditioning=texts, **GIVEN) for _ in range(3)))
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(
            pipe.run_async(conditioning=texts, on_progress=lambda _: loop.call_soon_threadsafe(started.set), **LONG)
        )
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return [each.generation.latents for each in many]

    assert all(torch.equal(each, right) for each in asyncio.run(all_of_it()))
    until(lambda: not client.status().jobs, "the cancelled job to end")


def test_a_loop_that_is_closed_in_mid_call_cancels_its_job(pipe: Pipeline, client: Client) -> None:
    right = run(pipe)
    loop = asyncio.new_event_loop()

    async def call() -> None:
        def stop(_: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(loop.stop)

        await pipe.run_async(conditioning=folders.flux1_texts(), on_progress=stop, **LONG)

    task = loop.create_task(call())
    task.add_done_callback(lambda _: loop.stop())
    loop.run_forever()
    assert client.status().jobs
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio warns of the task, which is meant
    loop.close()
    until(lambda: not client.status().jobs, "the job that nobody waits for to end")
    assert torch.equal(run(pipe), right)


def test_a_call_of_an_event_loop_that_waits_while_its_pipeline_is_closed(client: Client, folder: Path) -> None:
    pipe = Pipeline.open(folder, client=client)

    async def calls() -> list[Any]:
        running = [asyncio.create_task(pipe.run_async(conditioning=folders.flux1_texts(), **LONG)) for _ in range(18)]
        await asyncio.to_thread(until, lambda: client.status().jobs, "a job to run")
        await asyncio.to_thread(pipe.close)
        return await asyncio.gather(*running, return_exceptions=True)

    found = asyncio.run(calls())
    assert {type(each) for each in found} <= {Cancelled, LeaseLost, Closed}
    assert any("cancelled before it had begun, or its pipeline was closed" in str(each) for each in found)


def test_nothing_is_left_when_it_is_closed(client: Client, folder: Path) -> None:
    pipe = Pipeline.open(folder, client=client)
    running = pipe.submit(conditioning=folders.flux1_texts(), **LONG)
    until(running.running, "the call to run")
    pipe.close()
    with pytest.raises(Exception, match=r"cancelled|closed|returned"):
        running.result(timeout=60)
    assert not [each for each in threading.enumerate() if each.name.startswith("xditd-pipeline")]
    until_empty(client)


def test_a_job_that_is_watched_and_left(pipe: Pipeline) -> None:
    with pipe.start(conditioning=folders.flux1_texts(), **LONG) as job:
        for event in job:
            assert event.total_steps == 1000
            break
    with pytest.raises(Cancelled):
        job.result()
    assert "<PipelineJob of flux" in repr(job)


def test_a_storm_of_words_in_an_event_loop_leaves_nothing(one_worker: Any, tmp_path: Path) -> None:
    """20 generations from words at once; half of them are cancelled while words are encoded or steps run."""
    path = flux1_words.saved(tmp_path / "flux")
    prompts = ("a cat", "two dogs", "a hat", "猫")
    order = random.Random(0)

    async def run() -> tuple[list[Any], list[Any]]:
        async with AsyncClient(one_worker.runtime_dir) as client:
            roles = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            transformer = await client.lend(path / "transformer")
            loans = [await client.lend(path / role) for role in roles[:2]]
            loans += [await client.lend_tokenizer(path / role) for role in roles[2:]]
            encoders, tokenizers = (
                dict(zip(roles[:2], loans[:2], strict=True)),
                dict(zip(roles[2:], loans[2:], strict=True)),
            )

            async def one(number: int, steps: int = 2) -> torch.Tensor:
                words = await client.encode_prompt(
                    transformer, prompts[number % len(prompts)], encoders=encoders, tokenizers=tokenizers
                )
                job = await client.generate(transformer, words, width=96, height=64, steps=steps, seed=1)
                return (await job.result()).latents

            alone = [await one(number) for number in range(len(prompts))]
            tasks = [asyncio.create_task(one(number, 2 if number % 2 else 1000)) for number in range(20)]
            for task in order.sample(tasks[::2], 10):
                await asyncio.sleep(order.uniform(0, 0.1))
                task.cancel()
            return alone, await asyncio.gather(*tasks, return_exceptions=True)

    alone, found = asyncio.run(run())
    assert all(isinstance(each, asyncio.CancelledError) for each in found[::2])
    assert all(torch.equal(each, alone[number % len(prompts)]) for number, each in list(enumerate(found))[1::2])
    assert not torch.equal(alone[0], alone[1])
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("xditd-async")], "threads to end")
    with one_worker.connect() as client:
        until_empty(client)
