"""Two gloo ranks against plain diffusers in this process, at token counts that do and do not divide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import flux1_variants
import pytest
import torch
from forked_programs import ProgramServer, load_program
from safetensors.torch import load_file

from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.ipc.errors import Unsupported

Plugger = Callable[[ModelCache, dict[str, torch.Tensor]], CheckpointMatch]

BAR = 1e-6
PROGRAM = Path(__file__).with_name("two_ranks.py")
two_ranks = load_program(PROGRAM)


@pytest.fixture(scope="module")
def group(
    tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer
) -> dict[int, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """What each rank computed, and the facts that it noted."""
    folder = tmp_path_factory.mktemp("two_ranks")
    done = fork_program(PROGRAM, folder)
    assert done.returncode == 0, done.stderr
    return {
        rank: (load_file(folder / f"rank{rank}.safetensors"), json.loads((folder / f"rank{rank}.json").read_text()))
        for rank in (0, 1)
    }


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    from xditd.client.demo import checkpoints

    return {
        label: reference.transformer_from(checkpoints.flux1_state_dict(two_ranks.SEED, guidance=guidance))
        for label, guidance in (("dev", True), ("schnell", False))
    }


@pytest.mark.slow
@pytest.mark.parametrize("label", ["dev", "schnell"])
@pytest.mark.parametrize("case", list(two_ranks.CASES))
def test_two_ranks_agree_with_plain_diffusers(group: Any, models: Any, label: str, case: str) -> None:
    tokens, height, width, batch = two_ranks.CASES[case]
    given = two_ranks.inputs(tokens, height, width, batch)
    expected = reference.reference_latents(
        models[label],
        prompt_embeds=given["prompt_embeds"],
        pooled_prompt_embeds=given["pooled"],
        noise=given["noise"],
        height=height,
        width=width,
        steps=two_ranks.STEPS,
        guidance_scale=two_ranks.GUIDANCE,
    )
    assert reference.relative_error(group[0][0][f"{label}/{case}/0"], expected) <= BAR


@pytest.mark.slow
@pytest.mark.parametrize("channels", [64, 128, 384])
def test_two_ranks_agree_with_one_on_pictures(
    group: Any, cache: ModelCache, plug: Plugger, direct: ModuleType, channels: int
) -> None:
    model = plug(cache, flux1_variants.state_of(channels)).model
    given = {**flux1_variants.text(1), **flux1_variants.pictures(channels, 112, 112)}
    noise = flux1_variants.numbers(3, 1, 16, 14, 14)
    expected = direct.generate_from(model, given, noise, steps=two_ranks.STEPS, height=112, width=112)
    assert reference.relative_error(group[0][0][f"{channels} channels"], expected) <= BAR


@pytest.mark.slow
@pytest.mark.parametrize("case", list(two_ranks.CONTROLLED))
def test_two_ranks_agree_with_one_on_controlnets(
    group: Any, cache: ModelCache, plug: Plugger, direct: ModuleType, case: str
) -> None:
    from xditd.client.demo import checkpoints

    tokens, height, width, batch = two_ranks.CONTROLLED[case]
    model = plug(cache, checkpoints.flux1_state_dict(two_ranks.SEED)).model
    job = {**two_ranks.inputs(tokens, height, width, batch), "height": height, "width": width, "steps": two_ranks.STEPS}
    expected = direct.generate(model, **job, controls=two_ranks.controls_of(cache, height, width, batch))
    assert reference.relative_error(group[0][0][f"controls/{case}"], expected) <= BAR
    assert reference.relative_error(direct.generate(model, **job), expected) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("case", list(two_ranks.CASES))
def test_the_same_job_gives_the_same_bits(group: Any, case: str) -> None:
    results = group[0][0]
    assert torch.equal(results[f"dev/{case}/0"], results[f"dev/{case}/1"])


@pytest.mark.slow
def test_both_ranks_get_the_whole_result(group: Any) -> None:
    first, second = group[0][0], group[1][0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("label", ["dev", "schnell"])
def test_denoise_on_two_ranks_is_one_plain_forward(group: Any, models: Any, label: str) -> None:
    from diffusers import FluxPipeline

    tokens, height, width, batch = two_ranks.CASES["odd total, odd image"]
    given = two_ranks.inputs(tokens, height, width, batch)
    with torch.no_grad():
        packed = models[label](
            hidden_states=FluxPipeline._pack_latents(given["noise"], *given["noise"].shape),
            timestep=torch.full((batch,), 0.7),
            guidance=torch.full((batch,), two_ranks.GUIDANCE) if label == "dev" else None,
            pooled_projections=given["pooled"],
            encoder_hidden_states=given["prompt_embeds"],
            txt_ids=torch.zeros(tokens, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 16, width // 16, "cpu", torch.float32),
            return_dict=False,
        )[0]
    expected = FluxPipeline._unpack_latents(packed, height, width, 8)
    assert reference.relative_error(group[0][0][f"{label}/denoise"], expected) <= BAR


@pytest.mark.slow
@pytest.mark.parametrize("label", ["dev", "schnell"])
def test_two_ranks_spare_the_same_steps(group: Any, label: str) -> None:
    for rank in (0, 1):
        assert group[rank][1][f"{label} reused"] == len(two_ranks.ALIKE) - 1
    results = group[0][0]
    assert torch.equal(results[f"{label}/cached/0"], results[f"{label}/cached/1"])
    error = reference.relative_error(results[f"{label}/cached/0"], results[f"{label}/not cached"])
    assert 1e-5 < error < 0.02


@pytest.mark.slow
def test_ranks_decide_by_what_changed_on_all_of_them(group: Any) -> None:
    for rank in (0, 1):
        assert group[rank][1]["alike below 0.6"] == [True]
        assert group[rank][1]["alike below 0.4"] == [False]


@pytest.mark.slow
def test_too_few_tokens_are_refused_by_count_on_every_rank(group: Any) -> None:
    for rank in (0, 1):
        facts = group[rank][1]
        assert "1 text and 49 image tokens are too few to split over 2 workers" in facts["dev refuses one text token"]


@pytest.mark.slow
def test_heads_that_do_not_divide_run_in_a_ring(group: Any) -> None:
    from xditd.client.demo import checkpoints

    tokens, height, width, batch = two_ranks.CASES["odd total, odd image"]
    given = two_ranks.inputs(tokens, height, width, batch)
    expected = reference.reference_latents(
        reference.transformer_from(checkpoints.flux1_state_dict(two_ranks.SEED, **two_ranks.ODD_HEADS)),
        prompt_embeds=given["prompt_embeds"],
        pooled_prompt_embeds=given["pooled"],
        noise=given["noise"],
        height=height,
        width=width,
        steps=two_ranks.STEPS,
        guidance_scale=two_ranks.GUIDANCE,
    )
    for rank in (0, 1):
        results, facts = group[rank]
        assert facts["degrees of three heads"] == {"ulysses": 1, "ring": 2, "cfg": 1}
        assert reference.relative_error(results["three heads"], expected) <= BAR


@pytest.mark.slow
def test_agreement_between_ranks(group: Any) -> None:
    for rank in (0, 1):
        facts = group[rank][1]
        assert facts["agree on all true"] is True
        assert facts["agree when rank 1 is false"] is False
        assert facts["rank 0 stops"] is True
        assert facts["rank 1 alone stops"] is False
        assert facts["degrees"] == {"ulysses": 2, "ring": 1, "cfg": 1}


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_every_token_is_dealt_once_and_totals_are_equal(ranks: int) -> None:
    from xditd.gpu_workers.parallel.token_partition import partition_tokens

    for text in range(ranks, 3 * ranks):
        for image in range(49, 49 + 2 * ranks):
            shares = partition_tokens(text, image, ranks)
            assert [i for share in shares for i in range(text)[share.text]] == list(range(text))
            assert [i for share in shares for i in range(image)[share.image]] == list(range(image))
            totals = {share.text.stop - share.text.start + share.image_tokens + share.padding for share in shares}
            assert len(totals) == 1
            # Padding is dropped as the end of the gathered sequence, so no other rank may have any.
            assert all(share.padding == 0 for share in shares[:-1])


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize(("text", "image", "ranks"), [(1, 64, 2), (64, 1, 2), (7, 64, 8), (8, 7, 8), (9, 8, 8)])
def test_a_rank_without_tokens_is_refused(text: int, image: int, ranks: int) -> None:
    from xditd.gpu_workers.parallel.token_partition import partition_tokens

    with pytest.raises(Unsupported, match=f"{text} text and {image} image tokens"):
        partition_tokens(text, image, ranks)
