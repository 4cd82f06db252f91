"""Accelerated pipelines whose ``Accelerated`` nobody keeps: they run in the workers until they are given back."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
from fault_parts import same
from flux_pipelines import flux, run_plain
from running_daemon import RunningDaemon, until

from xditd.client import Client, Unsupported, accelerate, unaccelerate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_many_threads_as_the_worker")]


@pytest.mark.parametrize("name", ["pipeline", "model"])
def test_not_kept_and_given_back(one_worker: RunningDaemon, name: str) -> None:
    pipe = flux()
    given: Any = pipe if name == "pipeline" else pipe.transformer
    accelerate(given, runtime_dir=one_worker.runtime_dir)
    gc.collect()
    assert same(run_plain(pipe), run_plain(flux()))
    assert [each.label for each in one_worker.status().components]
    with pytest.raises(Unsupported, match=r"give the model back by unaccelerate\(pipe\) of xditd.client"):
        accelerate(given, runtime_dir=one_worker.runtime_dir)
    unaccelerate(given)
    assert "forward" not in vars(pipe.transformer)
    assert not one_worker.status().components
    unaccelerate(given)
    with accelerate(given, runtime_dir=one_worker.runtime_dir):  # without a name, it lasts for the block
        gc.collect()
        assert one_worker.status().components
    assert not one_worker.status().components


def test_threads_accelerate_one_model_once(client: Client) -> None:
    pipe = flux()
    found: list[object] = []

    def run() -> None:
        try:
            found.append(accelerate(pipe, client=client))
        except Unsupported as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(each, Unsupported) for each in found) == 2
    unaccelerate(pipe)
    assert "forward" not in vars(pipe.transformer)


def collect(pipes: list[Any]) -> None:
    pipes.clear()
    gc.collect()


@pytest.mark.parametrize("keep", ["client", "daemon"])
@pytest.mark.parametrize("owns_client", [True, False])
def test_collected_pipeline_is_given_back(one_worker: RunningDaemon, client: Client, keep: Any, owns_client) -> None:
    gc.collect()
    pipe = flux()
    if owns_client:
        accelerate(pipe, runtime_dir=one_worker.runtime_dir, keep=keep)
    else:
        accelerate(pipe, client=client, keep=keep)
    run_plain(pipe)
    module = weakref.ref(pipe.transformer)
    pipes = [pipe]
    del pipe
    with pytest.warns(ResourceWarning, match="transformer was garbage-collected while it was accelerated"):
        collect(pipes)
    assert module() is None
    until(lambda: not one_worker.status().components, "the loan to end", one_worker.log)
