"""The fused kernels on the CPU, in Triton's interpreter: the same numbers as plain diffusers, from every tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

BAR = 1e-6

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_program: Callable[..., None]) -> Any:
    folder = tmp_path_factory.mktemp("interpreted")
    run_program("interpreted.py", folder / "found.json", folder / "store")
    return json.loads((folder / "found.json").read_text())


def test_fused_blocks_agree_with_plain_diffusers(found: Any) -> None:
    assert found["model"]["parity"].keys() == {"dev", "schnell"}
    assert all(error <= BAR for error in found["model"]["parity"].values()), found["model"]["parity"]


def test_every_tensor_of_the_checkpoint_is_read(found: Any) -> None:
    assert found["model"]["unmoved"] == []


def test_residuals_of_controlnets_are_added_in_fused_blocks(found: Any) -> None:
    controls = found["model"]["controls"]
    assert controls["errors"].keys() == {"union", "double blocks alone", "both"}
    assert all(error <= BAR for error in controls["errors"].values()), controls["errors"]
    assert min(controls["moved"]) > 0.01
    assert controls["checked"] == [["fused FLUX.1 blocks with ControlNets", "3 text + 2 image", True]]
    assert controls["counted apart"] is True
    assert controls["as before"] is True


def test_loras_are_branches_of_fused_blocks(found: Any) -> None:
    loras = found["model"]["loras"]
    assert len(loras["errors"]) == 4
    assert all(error <= BAR for error in loras["errors"].values()), loras["errors"]
    assert loras["moved"] > 0.1
    assert loras["as before"] is loras["as before, too"] is loras["counted apart"] is True
    assert loras["checked"] == [["fused FLUX.1 blocks with LoRAs", "3 text + 2 image", True]]
    assert loras["refused"] <= BAR
    assert loras["takes"] == ""
    assert loras["still referenced"] == 0  # else lent memory could not be unmapped


def test_loras_that_are_captured_share_graphs_and_are_those_of_eager_blocks(found: Any) -> None:
    captured = found["model"]["loras"]["captured"]
    assert captured["eager without"] == 0  # where nothing is captured, factors are not copied
    assert all(error <= BAR for error in captured["errors"]), captured["errors"]
    assert captured["launched"] == [0, 2, 2, 0]  # two steps each: another strength, and a switch back
    assert (captured["copies"], captured["layouts"], captured["refusal"]) == (4, 2, "")
    assert captured["reports"] == [["captured", "LoRAs of rank 16"], ["captured", "LoRAs of rank 16, 32"]]
    assert captured["as before"] is True
    assert (captured["left"], captured["cases left"]) == (0, 0)  # with the LoRAs


def test_modulations_of_many_steps_have_the_bits_of_single_ones(found: Any) -> None:
    assert found["model"]["at once"] == {"all": True, "two": True}


def test_forwards_that_are_foreseen_compute_modulations_once_and_give_the_same_bits(found: Any) -> None:
    foreseen = found["model"]["foreseen"]
    assert foreseen["same bits"] is True
    # Two images: the first sigma, all four at once, one between them, a kept one, another prompt's, two kept ones.
    assert foreseen["vectors"] == [2, 8, 2, 0, 2, 0, 0]
    assert (foreseen["kept"], foreseen["left"]) == (10, 0)
    assert foreseen["vectors of the other variant"] == 2  # none that were rounded in another way


def test_a_timestep_in_float32_is_embedded_so_ahead_too(found: Any) -> None:
    half = found["model"]["half"]
    assert half["same bits"] is True
    assert half["refused"] is False
    assert half["error"] < 0.02 < half["apart"]


def test_norms_have_the_epsilon_of_the_variant(found: Any) -> None:
    epsilons = found["model"]["epsilons"]
    assert max(epsilons["class"], epsilons["float32_time"]) <= BAR
    assert epsilons["apart"] > 10 * BAR


def test_weights_that_are_not_finite_do_not_turn_fused_blocks_off(found: Any) -> None:
    assert found["model"]["not finite"] == {
        "result is NaN": True, "sound one is finite": True, "judged by it": False, "refused": False,
    }  # fmt: skip


def test_the_check_ran_once_for_each_number_of_tokens_and_passed(found: Any) -> None:
    checks = found["model"]["check"]
    assert [verdict["refused"] for verdict in checks.values()] == [False, False]
    assert [verdict["passed"] for verdict in checks.values()] == [2, 1]


def test_what_the_check_found_is_told_with_the_tokens_that_it_is_about(found: Any) -> None:
    checks = found["model"]["check"]["schnell"]["checks"]
    assert [(check["kernels"], check["case"], check["is_used"]) for check in checks] == [
        ("fused FLUX.1 blocks", "4 text + 3 image", True)
    ]
    assert 0.0 <= checks[0]["error"] < checks[0]["tolerance"]


def test_a_step_cache_does_on_fused_blocks_what_it_does_on_plain_ones(found: Any) -> None:
    cached = found["model"]["cached"]
    assert cached["fused"] == cached["plain"] == 1
    assert cached["error"] <= BAR
    assert 1e-6 < cached["cost"] < 0.02


def test_unplugging_lets_go_of_the_checkpoint(found: Any) -> None:
    assert not any(verdict["plugged after unplug"] for verdict in found["model"]["check"].values())


def test_tensors_with_gaps_are_left_to_plain_modules(found: Any) -> None:
    gapped = found["model"]["gapped"]
    assert gapped["plugged"] is False
    assert gapped["error"] <= BAR


def test_two_ranks_get_their_heads_and_then_their_tokens(found: Any) -> None:
    assert found["exchange"] == {"sent": 0.0, "returned": 0.0}
