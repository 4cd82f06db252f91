"""Stages on gloo ranks, or on NCCL ones: exact where every step warms up, and elsewhere just what the method says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from xditd.gpu_workers import reference
from xditd.gpu_workers.layouts import ParallelLayout

PROGRAM = Path(__file__).with_name("on_stages.py")
# Random weights react to stale neighbours more than trained ones do; what is wrong costs 0.5 and more.
STALE = 0.15


def load_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_stages", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


on_stages = load_program()
EXACT = [name for name, case in on_stages.CASES.items() if case.is_exact]
PATCHED = [name for name, case in on_stages.CASES.items() if not case.is_exact]


def run_program(folder: Path, dtype: str, devices: list[str], cases: str = on_stages.ALL) -> SimpleNamespace:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), dtype, cases, *devices],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = range(len(devices))
    return SimpleNamespace(
        dtype=dtype,
        results=[load_file(folder / f"rank{rank}.safetensors") for rank in ranks],
        facts=[json.loads((folder / f"rank{rank}.json").read_text()) for rank in ranks],
        reference=load_file(folder / "reference.safetensors"),
    )


TWO_RANKS = pytest.param(("float32", ["cpu", "cpu"]), id="two ranks", marks=pytest.mark.slow)
TWO_GPUS = pytest.param(("bfloat16", None), id="two GPUs", marks=pytest.mark.multigpu)


@pytest.fixture(scope="module", params=[TWO_RANKS, TWO_GPUS])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    dtype, devices = request.param
    devices = devices or os.environ.get("XDITD_TEST_DEVICES", "cuda:0,cuda:1").split(",")
    return run_program(tmp_path_factory.mktemp("stages"), dtype, devices)


@pytest.mark.parametrize("name", EXACT)
def test_warm_up_steps_are_exact(made: Any, name: str) -> None:
    error = reference.relative_error(made.results[0][f"{name}/0"], made.reference[name])
    # In bfloat16 diffusers' own attention sums in another order than xDiT's.
    assert error <= (1e-6 if made.dtype == "float32" else 2e-2)


@pytest.mark.parametrize("name", PATCHED)
def test_patches_stay_near(made: Any, name: str) -> None:
    assert 0.0 < reference.relative_error(made.results[0][f"{name}/0"], made.reference[name]) <= STALE


def test_repeats_have_the_same_bits(made: Any) -> None:
    for name in PATCHED:
        assert torch.equal(made.results[0][f"{name}/0"], made.results[0][f"{name}/1"]), name


def test_all_ranks_get_the_whole_result(made: Any) -> None:
    for name in on_stages.CASES:
        for others in made.results[1:]:
            assert torch.equal(made.results[0][f"{name}/0"], others[f"{name}/0"]), name


def test_every_rank_hears_of_every_step_and_the_first_sees_what_it_foresaw(made: Any) -> None:
    for name in ("every step warms up", "patches", "one step"):
        steps = on_stages.CASES[name].steps
        for facts in made.facts:
            assert [done for done, _, _ in facts[f"steps/{name}"]] == list(range(1, steps + 1))
        # Watching changes nothing.
        assert torch.equal(made.results[0][f"watched/{name}"], made.results[0][f"{name}/0"])
        assert not any(key.startswith("denoised/") for key in made.results[1])
    assert [seen for _, _, seen in made.facts[0]["steps/every step warms up"]] == [1, 2, 3, 4, 5]
    assert [seen for _, _, seen in made.facts[0]["steps/patches"]] == [1, 1, 2, 3, 4]
    # After the last step, what was foreseen is the result.
    found = made.results[0]
    assert torch.equal(found["denoised/every step warms up/4"], found["every step warms up/0"].float())
    errors = [
        reference.relative_error(found[f"denoised/patches/{number}"], found["patches/0"].float()) for number in range(4)
    ]
    assert errors == sorted(errors, reverse=True)


def test_a_cancelled_job_ends_on_all_ranks_at_the_same_step_and_the_next_one_is_right(made: Any) -> None:
    for facts in made.facts:
        assert facts["cancelled"] == [f"cancelled after step {step} of 5" for step in (1, 2, 5)]
    name = next(name for name, case in on_stages.CASES.items() if case == on_stages.CANCELLED)
    assert torch.equal(made.results[0]["after cancelling"], made.results[0][f"{name}/0"])


def test_latents_stay_in_float32_where_the_variant_says_so(made: Any) -> None:
    for name in ("every step warms up, given sigmas", "patches, given sigmas"):
        result, rounded = made.results[0][f"comfyui/{name}"], made.results[0][f"{name}/0"]
        assert result.dtype == torch.float32
        assert torch.equal(result, made.results[-1][f"comfyui/{name}"])
        if made.dtype == "float32":
            assert torch.equal(result, rounded)
        else:
            assert 1e-3 < reference.relative_error(rounded, result) < STALE


def test_all_ranks_name_the_step_whose_latents_are_not_finite(made: Any) -> None:
    for facts in made.facts:
        assert "latents after step 4 of 5: some values are NaN" in facts["not finite"]


def test_what_stages_cannot_do_is_refused_by_name(made: Any) -> None:
    for facts in made.facts:
        assert f"denoise: the workers' layout pipefusion={len(made.facts)} runs whole generations" in facts["denoise"]
        assert "step_cache_threshold: a stage of pipefusion=" in facts["step cache"]
        assert "1 image tokens are too few for 2 PipeFusion patches" in facts["one image token"]
        assert "2 blocks are too few for 3 PipeFusion stages" in facts["two blocks"]


@pytest.fixture
def stages(layout: ParallelLayout) -> Any:
    """Make all stages of a case, in this process."""
    from xditd.gpu_workers.families.base import TensorInfo
    from xditd.gpu_workers.pipefusion.flux1 import StagedFlux1
    from xditd.gpu_workers.skeletons import SkeletonCache

    def make(case: Any, count: int) -> list[Any]:
        state = on_stages.checkpoint(case.blocks, case.is_dev, "cpu", torch.float32)
        plan = SkeletonCache(layout).plan({name: TensorInfo.of(tensor) for name, tensor in state.items()})
        made = []
        for stage in range(count):
            with torch.device("meta"):
                module = StagedFlux1(stage, count, **plan.skeleton.module.config)
            module.load_state_dict(plan.bind(state), assign=True)
            made.append(module.eval())
        return made

    return make


@pytest.mark.slow
@pytest.mark.parametrize("made", [TWO_RANKS], indirect=True)
@pytest.mark.parametrize("name", PATCHED)
def test_patches_have_the_bits_of_the_same_turns_in_one_process(made: Any, stages: Any, name: str) -> None:
    case = on_stages.CASES[name]
    assert torch.equal(made.results[0][f"{name}/0"], one_turn_after_the_other(stages(case, 2), case))


@pytest.mark.long
@pytest.mark.slow
def test_three_stages(stages: Any, tmp_path: Path) -> None:
    exact, patched = "every step warms up, blocks do not divide", "patches, blocks do not divide"
    made = run_program(tmp_path, "float32", ["cpu"] * 3, f"{exact};{patched}")
    assert reference.relative_error(made.results[0][f"{exact}/0"], made.reference[exact]) <= 1e-6
    case = on_stages.CASES[patched]
    expected = one_turn_after_the_other(stages(case, 3), case)
    for results in made.results:
        assert torch.equal(results[f"{patched}/0"], expected)
        assert torch.equal(results[f"{patched}/1"], expected)


@torch.inference_mode()
def one_turn_after_the_other(stages: list[Any], case: Any) -> torch.Tensor:
    """PipeFusion as its paper has it, with nothing at the same time."""
    from diffusers import FluxPipeline

    from xditd.gpu_workers.pipefusion.generation import schedule_of
    from xditd.gpu_workers.pipefusion.key_values import KeyValues

    given = on_stages.inputs(case)
    latents = FluxPipeline._pack_latents(given["noise"], *given["noise"].shape).clone()
    image, text = latents.shape[1], case.tokens
    dev = {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15}
    schedule = schedule_of(
        dev if case.sigmas is None else {}, steps=case.steps, sigmas=case.sigmas, image_tokens=image, device="cpu"
    )
    ids = FluxPipeline._prepare_latent_image_ids(1, case.height // 16, case.width // 16, "cpu", torch.float32)
    cosine, sine = stages[0].pos_embed(torch.cat((torch.zeros(text, 3), ids)))
    kept = [KeyValues(text) for _ in stages]
    for step in range(case.steps):
        timestep = schedule.timesteps[step].expand(case.batch) / 1000
        guidance = torch.full((case.batch,), on_stages.GUIDANCE)
        ends = [0, image]
        if step >= case.warm_up:
            sizes = [image // case.patches + (number < image % case.patches) for number in range(case.patches)]
            ends = [sum(sizes[:number]) for number in range(case.patches + 1)]
        first_texts: dict[int, torch.Tensor] = {}
        for start, stop in pairwise(ends):
            rows = [*range(text), *range(text + start, text + stop)]
            rotary = cosine[rows], sine[rows]
            state, words = (
                stages[0].x_embedder(latents[:, start:stop]),
                stages[0].context_embedder(given["prompt_embeds"]),
            )
            for number, stage in enumerate(stages):
                kept[number].turn_to(None if step < case.warm_up else slice(start, stop))
                modulation = stage.condition(timestep, guidance, given["pooled"], "class")
                if number > 0:
                    words = first_texts.setdefault(number, words)
                state, words = stage.run_stage(state, words, modulation, rotary, kept[number])
            velocity = stages[-1].predict(state, modulation)
            latents[:, start:stop] += (schedule.sigmas[step + 1] - schedule.sigmas[step]) * velocity
    return FluxPipeline._unpack_latents(latents, case.height, case.width, 8)


@pytest.mark.parametrize(("count", "parts"), [(57, 2), (57, 4), (4096, 3), (49, 2), (5, 5)])
def test_everything_is_dealt_once_and_evenly(count: int, parts: int) -> None:
    from xditd.gpu_workers.pipefusion.shares import deal

    dealt = deal(count, parts)
    assert [each for share in dealt for each in range(count)[share]] == list(range(count))
    sizes = {share.stop - share.start for share in dealt}
    assert max(sizes) - min(sizes) <= 1
