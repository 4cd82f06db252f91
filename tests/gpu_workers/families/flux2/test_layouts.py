"""Every kind of layout on gloo ranks against plain diffusers in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flux2_models
import pytest
import torch
from forked_programs import ProgramServer, load_program
from layout_programs import Computed, check_agrees, check_same_bits, computed_by, layout_parameters

BAR = 1e-6
PROGRAM = Path(__file__).with_name("many_layouts.py")

many_layouts = load_program(PROGRAM)
LAYOUTS = layout_parameters(many_layouts.LAYOUTS, long=("ulysses=3", "ring=3", "cfg=2,ulysses=2", "ulysses=4"))


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer) -> Computed:
    """Return what each rank of a layout got."""
    return computed_by(PROGRAM, tmp_path_factory.mktemp("layouts"), fork_program)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What diffusers' own class and pipeline give, row by row."""
    module = flux2_models.reference(
        flux2_models.state_dict(many_layouts.SEED, many_layouts.CONFIG), many_layouts.CONFIG
    )
    found: dict[str, Any] = {}
    for case, given in many_layouts.CALLS.items():
        with torch.no_grad():
            found[case] = module(**flux2_models.inputs(*given[:3], many_layouts.CONFIG, given[3]), return_dict=False)[0]
    for case in many_layouts.SAMPLES:
        conditioning, noise = many_layouts.sample(case)
        references = conditioning.pop("reference_latents", ())
        found[case] = flux2_models.pipeline_latents(
            module,
            noise=noise,
            steps=many_layouts.STEPS,
            conditioning=conditioning,
            guidance_scale=many_layouts.SAMPLES[case][4],
            references=references,
            has_cache=many_layouts.SAMPLES[case][6],
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_agrees_with_plain_diffusers(computed: Computed, expected: dict[str, Any], layout: str) -> None:
    check_agrees(computed(layout)[0], expected, flux2_models.relative_error, BAR)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_bits_again_and_on_every_rank(computed: Computed, layout: str) -> None:
    check_same_bits(computed(layout))
