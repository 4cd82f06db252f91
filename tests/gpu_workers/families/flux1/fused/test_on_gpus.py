"""Fused blocks on GPUs: as near to float32 as plain modules, and refused if they are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

ONE = pytest.param(1, marks=pytest.mark.gpu, id="one GPU")
TWO = pytest.param(2, marks=pytest.mark.multigpu, id="two GPUs")
# Both ways round to bfloat16 about as often; which of two such results is nearer is chance.
AS_NEAR = 1.15


@pytest.fixture(scope="module", params=[ONE, TWO])
def facts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_program: Callable[..., None]
) -> Any:
    folder = tmp_path_factory.mktemp("fused")
    run_program("on_gpus.py", folder, request.param)
    return json.loads((folder / "facts.json").read_text())


def test_fused_blocks_are_as_near_to_float32_as_plain_ones(facts: Any) -> None:
    assert len(facts["cases"]) == 5
    for case, found in facts["cases"].items():
        assert 0.0 < found["fused"] <= AS_NEAR * found["plain"], (case, found)


def test_repeats_have_the_same_bits(facts: Any) -> None:
    assert all(found["same bits twice"] for found in facts["cases"].values())


def test_the_check_judged_every_number_of_tokens_and_refused_none(facts: Any) -> None:
    assert facts["check"] == {"refused": False, "passed": 5}


def test_eight_bits_are_off_by_their_rounding_and_repeat_bit_by_bit(facts: Any) -> None:
    eight = facts["eight bits"]
    assert len(eight["cases"]) == 5
    for case, found in eight["cases"].items():
        assert 5e-3 < found["error"] < 0.1, (case, found)
        assert found["same bits twice"] is True
    assert eight["check"]["refused"] is False
    assert eight["check"]["passed"] == 5
    assert 5e-3 < eight["check"]["error"] < 0.1


def test_the_copy_in_eight_bits_is_what_was_reserved_and_goes_when_unplugged(facts: Any) -> None:
    eight = facts["eight bits"]
    products = 3072 * 3072 * 12 * (2 * 2 + 2)  # two double blocks of two streams, two single ones
    assert products < eight["reserved"] < 1.01 * products
    assert eight["reserved"] <= eight["held"] < eight["reserved"] + 2**22
    assert eight["left"] < eight["reserved"] / 4  # workspaces of libraries


def test_a_step_cache_spares_what_is_alike_on_every_rank(facts: Any) -> None:
    assert len(facts["cached"]) == 4
    for case, found in facts["cached"].items():
        images = 2 if "two samples" in case else 1
        assert found["spared"] == [0, images], (case, found)
        assert 0.0 < found["error"] < 0.05, (case, found)
        assert found["same bits twice"] is True


def test_wrong_blocks_are_refused_and_the_plain_result_is_given(facts: Any) -> None:
    assert facts["broken"] == {"refused": True, "plain bits": True, "untouched": True}
