"""One shared rank in this process for tests of models, since importing xfuser is slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.parallel import rank_sync
from xditd.gpu_workers.parallel.layouts import ParallelLayout

if TYPE_CHECKING:
    from one_rank import OneRank

State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParallelLayout]:
    """A started group of one rank on the CPU."""
    from xditd.gpu_workers.process import xfuser_start

    yield xfuser_start.start(0, 1, str(tmp_path_factory.mktemp("group") / "store"), torch.device("cpu"))
    xfuser_start.stop()


@pytest.fixture
def cache(layout: ParallelLayout) -> ModelCache:
    return ModelCache(layout)


@pytest.fixture(scope="session")
def shared_cache(layout: ParallelLayout) -> ModelCache:
    return ModelCache(layout)


@pytest.fixture(scope="session")
def direct(layout: ParallelLayout) -> ModuleType:
    """``support/direct_jobs.py``, which imports xfuser."""
    import direct_jobs

    return direct_jobs


@pytest.fixture
def rank(layout: ParallelLayout) -> Iterator[OneRank]:
    """A rank that runs whole jobs; nothing is lent to it yet."""
    import one_rank

    rank = one_rank.OneRank(layout)
    yield rank
    rank.close()


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Use all cores, as rank 0 does for what it decodes and encodes alone."""
    with rank_sync.using_all_cores(torch.device("cpu")):
        yield


@pytest.fixture(scope="session")
def demo_transformer() -> State:
    from xditd.client.demo import checkpoints

    return checkpoints.flux1_state_dict(0)


@pytest.fixture(scope="session")
def demo_vae() -> State:
    from xditd.client.demo import checkpoints

    return checkpoints.flux_vae_state_dict(0)


@pytest.fixture(scope="session")
def describe() -> Callable[[State], dict[str, TensorInfo]]:
    """Describe tensors as a manifest does."""
    return _describe


@pytest.fixture(scope="session")
def plug() -> Callable[[ModelCache, State], CheckpointMatch]:
    """CheckpointMatch a checkpoint, and plug its tensors into the model that comes of it."""

    def match_and_plug(cache: ModelCache, state: State) -> CheckpointMatch:
        match = cache.match(_describe(state))
        match.model.plug(match.bind(state))
        return match

    return match_and_plug


def _describe(state: State) -> dict[str, TensorInfo]:
    return {name: TensorInfo.of(tensor) for name, tensor in state.items()}


@pytest.fixture
def transformer(
    shared_cache: ModelCache, demo_transformer: State, plug: Callable[[ModelCache, State], CheckpointMatch]
) -> CachedModel:
    return plug(shared_cache, demo_transformer).model


@pytest.fixture
def vae(shared_cache: ModelCache, demo_vae: State, plug: Callable[[ModelCache, State], CheckpointMatch]) -> CachedModel:
    return plug(shared_cache, demo_vae).model
