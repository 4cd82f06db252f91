"""Every kind of layout on gloo ranks against plain diffusers in one process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import wan_models
from forked_programs import ProgramServer
from safetensors.torch import load_file

from xditd.ipc.degrees import Degrees, parse_layout

BAR = 1e-6
PROGRAM = Path(__file__).with_name("many_layouts.py")


def load_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wan_many_layouts", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


many_layouts = load_program()
LAYOUTS = [
    pytest.param(layout, marks=pytest.mark.long if layout in ("ring=3", "cfg=2,ulysses=2") else ())
    for layout in many_layouts.LAYOUTS
]
Computed = Callable[[str], list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer) -> Computed:
    """Return what each rank of a layout got."""
    folder = tmp_path_factory.mktemp("layouts")

    @cache
    def run(layout: str) -> list[dict[str, torch.Tensor]]:
        done = fork_program(PROGRAM, folder, layout)
        assert done.returncode == 0, done.stderr[-4000:]
        ranks = range(Degrees(**parse_layout(layout)).world_size)
        return [load_file(folder / layout / f"rank{rank}.safetensors") for rank in ranks]

    return run


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
    results, *_ = computed(layout)
    for case, rows in expected.items():
        for row, right in enumerate(rows):
            error = wan_models.relative_error(results[f"{case}/0/{row}"], right)
            assert error <= BAR, f"{case}, row {row}: {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_same_bits_again_and_on_every_rank(computed: Computed, layout: str) -> None:
    first, *others = computed(layout)
    for name, tensor in first.items():
        case, attempt, row = name.split("/")
        assert torch.equal(tensor, first[f"{case}/{1 - int(attempt)}/{row}"]), name
        assert all(torch.equal(tensor, results[name]) for results in others), name
