"""Every kind of layout on gloo ranks against plain diffusers in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import wan_models
from forked_programs import ProgramServer, load_program
from layout_programs import Computed, check_agrees, check_same_bits, computed_by, layout_parameters

BAR = 1e-6
PROGRAM = Path(__file__).with_name("many_layouts.py")

many_layouts = load_program(PROGRAM)
LAYOUTS = layout_parameters(many_layouts.LAYOUTS, long=("ring=3", "cfg=2,ulysses=2"))


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer) -> Computed:
    """Return what each rank of a layout got."""
    return computed_by(PROGRAM, tmp_path_factory.mktemp("layouts"), fork_program)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What diffusers' own class gives, row by row."""
    modules = {
        name: wan_models.reference(wan_models.state_dict(many_layouts.SEED, config), config)
        for name, config in many_layouts.CONFIGS.items()
    }
    found: dict[str, Any] = {}
    for case, (model, *_) in many_layouts.CALLS.items():
        if case.startswith("two controls"):
            config = many_layouts.CONFIGS[model]
            state = wan_models.state_dict(many_layouts.SEED, config)
            found[case] = wan_models.controlled_reference(state, config, many_layouts.inputs(case))
            continue
        with torch.no_grad():
            found[case] = modules[model](**many_layouts.inputs(case), return_dict=False)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_agrees_with_plain_diffusers(computed: Computed, expected: dict[str, Any], layout: str) -> None:
    check_agrees(computed(layout)[0], expected, wan_models.relative_error, BAR)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_bits_again_and_on_every_rank(computed: Computed, layout: str) -> None:
    check_same_bits(computed(layout))
