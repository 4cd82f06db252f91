"""Captured fused blocks with LoRAs on GPUs: those of eager blocks, and one graph for all LoRAs of a layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

ONE = pytest.param(1, marks=pytest.mark.gpu, id="one GPU")
TWO = pytest.param(2, marks=pytest.mark.multigpu, id="two GPUs")
BAR = 1e-2


@pytest.fixture(scope="module", params=[ONE, TWO])
def facts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_program: Callable[..., None]
) -> Any:
    folder = tmp_path_factory.mktemp("loras")
    run_program("loras_on_gpus.py", folder, request.param)
    return json.loads((folder / "facts.json").read_text())


def test_a_graph_with_loras_has_the_bits_of_the_forward_that_was_captured(facts: Any) -> None:
    assert facts["graph"] is True
    assert facts["after two jobs"] == {"forwards": 4, "launched": 2, "layouts": 1, "copies": 1}


def test_other_loras_strengths_and_steps_need_no_new_graph(facts: Any) -> None:
    before, after = facts["after two jobs"], facts["after switches"]
    assert after["layouts"] == before["layouts"]
    # Each of five cases twice, of two steps; one of these has no strength.
    assert after["forwards"] - before["forwards"] == after["launched"] - before["launched"] == 18
    assert [each for each in facts["reports"] if each[1].startswith("LoRAs")] == [["captured", "LoRAs of rank 16"]]


def test_captured_loras_are_those_of_eager_blocks(facts: Any) -> None:
    assert len(facts["cases"]) == 5
    for case, found in facts["cases"].items():
        assert found["error"] <= BAR < found["moved"], (case, found)
        assert found["same bits twice"] is True
    assert max(facts["both"]) <= BAR


def test_forwards_without_loras_have_their_own_graph_and_bits(facts: Any) -> None:
    assert facts["plain"] is facts["without, between"] is facts["left"]["plain"] is True


def test_200_switches_among_20_loras_are_right_and_take_no_memory(facts: Any) -> None:
    switches = facts["switches"]
    assert (switches["wrong"], switches["layouts"], switches["memory"]) == (0, 0, 0)
    assert switches["allocated"] <= 2**20  # tables of copies
    assert switches["slowest_ms"] < 1.0


def test_memory_goes_with_the_loras(facts: Any) -> None:
    assert facts["left"]["memory"] == 0
    assert facts["left"]["allocated"] <= 2**22
