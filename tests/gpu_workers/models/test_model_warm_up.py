"""Warm-ups of announced models: nothing of them is left, in memory, in checks or in results."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_programs import ProgramServer

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.client.outlines import outline_of
from xditd.gpu_workers.models import model_warm_up
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.ipc.errors import BadRequest, OutOfMemory

State = dict[str, torch.Tensor]
Describer = Callable[[State], dict[str, TensorInfo]]
SIZES = {"rows": 1, "text_tokens": 6, "image_tokens": 16}


@pytest.fixture
def state() -> State:
    return flux1_state_dict(0, heads=1, double_blocks=2, single_blocks=3, context_dim=64, pooled_dim=32)


@pytest.fixture
def warm_up(cache: ModelCache, describe: Describer, state: State) -> Callable[[], None]:
    return lambda: model_warm_up.warm_up(cache.match(describe(state)), outline_of(state).tensors, SIZES)


def test_afterwards_the_model_is_as_it_was(
    warm_up: Any,
    cache: ModelCache,
    describe: Describer,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import direct_jobs

    from xditd.gpu_workers.models import calls

    made: list[weakref.ref[torch.UntypedStorage]] = []
    forwards: list[torch.Tensor] = []
    make, run = model_warm_up._random, calls.run_parts

    def note_made(*given: object) -> torch.Tensor:
        tensor = make(*given)  # type: ignore[arg-type]
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    def note_forward(*given: object) -> list[object]:
        (rows,) = run(*given)  # type: ignore[arg-type]
        forwards.append(torch.stack(list(rows)))
        return [rows]

    monkeypatch.setattr(model_warm_up, "_random", note_made)
    monkeypatch.setattr(calls, "run_parts", note_forward)
    warm_up()
    match = cache.match(describe(state))
    assert match.is_reused
    assert match.model.owner is None
    assert all(parameter.is_meta for parameter in match.model.module.parameters())
    assert [tuple(each.shape) for each in forwards] == [(1, 16, 64)]
    assert forwards[0].isfinite().all()
    forwards.clear()
    gc.collect()
    shapes = {(tensor.dtype, tensor.shape) for tensor in state.values()}
    assert len(made) == len(shapes) + 7  # one for each shape, and the arguments
    assert not any(ref() for ref in made)

    def predict(models: ModelCache) -> torch.Tensor:
        found = models.match(describe(state))
        found.model.plug(found.bind(state), "a", found.by_canonical_name(state))
        generator = torch.Generator().manual_seed(0)
        return direct_jobs.denoise(
            found.model,
            latents=torch.randn(1, 16, 4, 4, generator=generator),
            timestep=torch.tensor([0.5]),
            prompt_embeds=torch.randn(1, 3, 64, generator=generator),
            pooled=torch.randn(1, 32, generator=generator),
            guidance=torch.tensor([3.5]),
        )

    assert torch.equal(predict(cache), predict(ModelCache(cache.layout)))


@pytest.mark.parametrize("error", [BadRequest("a size that does not fit"), OutOfMemory("no room")], ids=str)
def test_one_that_fails_leaves_nothing_plugged(
    warm_up: Any,
    cache: ModelCache,
    describe: Describer,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    from xditd.gpu_workers.models import calls

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(calls, "run_parts", fail)
    with pytest.raises(type(error)):
        warm_up()
    model = cache.match(describe(state)).model
    assert model.owner is None
    assert all(parameter.is_meta for parameter in model.module.parameters())


def test_weights_that_have_no_room_leave_nothing_plugged(
    warm_up: Any,
    cache: ModelCache,
    describe: Describer,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_warm_up, "_random", fail)
    with pytest.raises(OutOfMemory, match="the GPU has no room"):
        warm_up()
    assert cache.match(describe(state)).model.owner is None


def test_models_that_have_had_weights_are_not_warmed_up(
    warm_up: Any,
    cache: ModelCache,
    describe: Describer,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CachedModel, "warm_up_sizes", SIZES)
    assert model_warm_up.can_warm_up(cache.match(describe(state)))
    warm_up()
    assert not model_warm_up.can_warm_up(cache.match(describe(state)))


def test_models_without_a_fast_path_that_names_sizes_are_not_warmed_up(
    cache: ModelCache, describe: Describer, state: State
) -> None:
    assert not model_warm_up.can_warm_up(cache.match(describe(state)))


def test_ranks_decide_together_though_one_of_them_had_the_model(tmp_path: Path, fork_program: ProgramServer) -> None:
    done = fork_program(Path(__file__).with_name("warming_ranks.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    decisions = [False] * 4 + [True]
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: {decisions}" for rank in range(2)]
