"""The step cache: steps with small changes are reused, for each image of a batch, and never after NaN."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.step_cache import StepCache
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import Cancelled

# Steps that hardly differ, twice: random weights react to every step of a usual schedule as to another image.
SIGMAS = (1.0, 0.9999, 0.9998, 0.5, 0.4999)
ALIKE = 3
BATCH = 2


@pytest.fixture(scope="module")
def model(layout: ParallelLayout) -> CachedModel:
    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.models.entries import TensorInfo

    state = checkpoints.flux1_state_dict(0)
    match: CheckpointMatch = ModelCache(layout).match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    match.model.plug(match.bind(state))
    return match.model


@pytest.fixture(scope="module")
def run(model: CachedModel, direct: ModuleType) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    given: dict[str, Any] = {
        "prompt_embeds": torch.randn(BATCH, 9, 4096, generator=generator),
        "pooled": torch.randn(BATCH, 768, generator=generator),
        "noise": torch.randn(BATCH, 16, 8, 12, generator=generator),
    }

    def run(cache: StepCache | None = None, **more: Any) -> torch.Tensor:
        return direct.generate(
            model, **given, height=64, width=96, steps=len(SIGMAS), sigmas=SIGMAS, step_cache=cache, **more
        )

    return run


def test_a_cache_that_finds_nothing_alike_changes_no_bit(run: Callable[..., torch.Tensor]) -> None:
    cache = StepCache(1e-9)
    assert torch.equal(run(cache), run())
    assert cache.reused == 0


def test_steps_that_are_alike_are_spared_for_a_bounded_error(run: Callable[..., torch.Tensor]) -> None:
    cache, again = StepCache(0.1), StepCache(0.1)
    result = run(cache)
    assert cache.reused == again.reused + ALIKE * BATCH == ALIKE * BATCH
    assert 1e-5 < reference.relative_error(result, run()) < 0.02
    assert torch.equal(run(again), result)


def test_the_model_is_whole_again_after_a_job_and_after_one_that_was_cancelled(
    model: CachedModel, run: Callable[..., torch.Tensor]
) -> None:
    module: Any = model.module
    blocks = (module.transformer_blocks, module.single_transformer_blocks)

    def cancel(step: int, _: int) -> None:
        if step == 2:
            raise Cancelled("by the test")

    run(StepCache(0.1))
    with pytest.raises(Cancelled):
        run(StepCache(0.1), on_step=cancel)
    assert (module.transformer_blocks, module.single_transformer_blocks) == blocks


@pytest.mark.usefixtures("layout")  # verdicts are agreed on in the process group
def test_each_image_is_compared_with_its_own_last_computed_step() -> None:
    cache = StepCache(0.1)
    one, other = torch.ones(4, 8), torch.full((4, 8), 2.0)
    assert cache.decide(range(2), torch.stack([one, other])) == [False, False]
    cache.keep(0, one)
    cache.keep(1, other)
    assert cache.decide(range(2), torch.stack([one * 1.09, other * 1.2])) == [True, False]
    cache.keep(1, other * 3)
    assert torch.equal(cache.reuse(0), one)
    # Not with the one before: the first has drifted by now, the second was computed anew.
    assert cache.decide(range(2), torch.stack([one * 1.11, other * 1.3])) == [False, True]
    assert torch.equal(cache.reuse(1), other * 3)
    assert cache.reused == 2


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0], ids=["NaN", "infinite", "zero"])
def test_what_is_no_size_to_compare_with_is_computed(value: float) -> None:
    cache = StepCache(1.0)
    tokens = torch.full((1, 4, 8), value)
    assert cache.decide(range(1), tokens) == [False]
    cache.keep(0, tokens[0])
    assert cache.decide(range(1), tokens) == [False]


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decisions_are_those_of_diffusers_where_half_precision_rounds_the_difference(dtype: torch.dtype) -> None:
    """Thresholds beside each difference: rounded as diffusers' hook does it, and in float32."""
    from diffusers.hooks.first_block_cache import FBCHeadBlockHook, FBCSharedBlockState
    from diffusers.hooks.hooks import CacheContext, StateManager

    generator = torch.Generator().manual_seed(0)
    decided = []
    for scale in (0.02, 0.05, 0.08, 0.13, 0.3):
        before = torch.randn(1, 40, 16, generator=generator).to(dtype)
        now = (before.float() + scale * torch.randn(1, 40, 16, generator=generator)).to(dtype)
        means = (now - before).abs().mean(), before.abs().mean()
        rounded, wide = (
            (means[0] / means[1]).item(),
            float((now - before).abs().float().mean() / before.abs().float().mean()),
        )
        for threshold in (rounded, (rounded + wide) / 2, rounded * 0.99, rounded * 1.01):
            states = StateManager(FBCSharedBlockState)
            states.set_context(CacheContext("cond"))
            states.get_state().head_block_residual = before
            hook = FBCHeadBlockHook(states, threshold)
            cache = StepCache(threshold)
            assert cache.decide(range(1), before) == [False]
            cache.keep(0, before)
            (decision,) = cache.decide(range(1), now)
            assert decision is not hook._should_compute_remaining_blocks(now)
            decided.append(decision is (wide < threshold))
    assert not all(decided)  # some differ from what float32 would decide
