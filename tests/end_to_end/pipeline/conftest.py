"""Pipelines of diffusers in folders, opened on a daemon with one worker and one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipeline_folders as folders
import pytest
import torch

from xditd.client import Client, Pipeline


@pytest.fixture(scope="package", autouse=True)
def as_many_threads_as_the_worker() -> Iterator[None]:
    """Sums over another number of threads may differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def client(one_worker: Any) -> Iterator[Client]:
    with one_worker.connect() as connected:
        yield connected


@pytest.fixture
def opened(client: Client, tmp_path: Path) -> Iterator[Callable[..., Pipeline]]:
    """Save a pipeline, and open its folder."""
    pipes: list[Pipeline] = []

    def open_folder(pipeline: Any, **more: Any) -> Pipeline:
        folder = folders.saved(pipeline, tmp_path / f"model{len(pipes)}")
        pipes.append(Pipeline.open(folder, client=client, **more))
        return pipes[-1]

    yield open_folder
    for each in pipes:
        each.close()
