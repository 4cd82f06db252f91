"""Models of different numbers of attention heads in one group, each with degrees of its own, beside plain diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from forked_programs import ProgramServer, load_program
from safetensors.torch import load_file

from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.parallel import sequence_groups
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.process.xfuser_start import GROUP_TIMEOUT
from xditd.ipc.degrees import Degrees, parse_layout

BAR = 1e-6
PROGRAM = Path(__file__).with_name("mixed_heads.py")
mixed_heads = load_program(PROGRAM)
LONG = "ulysses=2,ring=2"
GROUPS = [pytest.param(layout, marks=pytest.mark.long if layout == LONG else ()) for layout in mixed_heads.GROUPS]
MODELS = [(layout, heads) for layout, models in mixed_heads.GROUPS.items() for heads in models]

Rank = tuple[dict[str, torch.Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer) -> Callable[[str], list[Rank]]:
    """Return what each rank of a group got, and the facts that it noted."""
    folder = tmp_path_factory.mktemp("mixed_heads")

    @cache
    def run(layout: str) -> list[Rank]:
        done = fork_program(PROGRAM, folder, layout)
        assert done.returncode == 0, done.stderr[-4000:]
        return [
            (
                load_file(folder / layout / f"rank{rank}.safetensors"),
                json.loads((folder / layout / f"rank{rank}.json").read_text()),
            )
            for rank in range(Degrees(**parse_layout(layout)).world_size)
        ]

    return run


@pytest.fixture(scope="module")
def expected() -> dict[int, dict[str, torch.Tensor]]:
    """One forward of plain diffusers for each model and case."""
    from diffusers import FluxPipeline

    from xditd.client.demo import checkpoints

    found: dict[int, dict[str, torch.Tensor]] = {}
    for heads in {heads for _, heads in MODELS}:
        state = checkpoints.flux1_state_dict(mixed_heads.SEED, heads=heads, **mixed_heads.MODEL)
        model = reference.transformer_from(state)
        found[heads] = {}
        for case, (tokens, height, width, rows) in mixed_heads.CASES.items():
            given = mixed_heads.inputs(tokens, height, width, rows)
            with torch.no_grad():
                packed = model(
                    hidden_states=FluxPipeline._pack_latents(given["latents"], *given["latents"].shape),
                    timestep=given["timestep"],
                    guidance=given["guidance"],
                    pooled_projections=given["pooled"],
                    encoder_hidden_states=given["prompt_embeds"],
                    txt_ids=torch.zeros(tokens, 3),
                    img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
                    return_dict=False,
                )[0]
            found[heads][case] = FluxPipeline._unpack_latents(packed, height * 8, width * 8, 8)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "heads"), [pytest.param(*each, marks=pytest.mark.long if each[0] == LONG else ()) for each in MODELS]
)
def test_each_model_agrees_with_plain_diffusers(computed: Any, expected: Any, layout: str, heads: int) -> None:
    results, _ = computed(layout)[0]
    for case, rows in expected[heads].items():
        for row, right in enumerate(rows):
            error = reference.relative_error(results[f"{heads}/{case}/0"][row], right)
            assert error <= BAR, f"{case}, row {row}: {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", GROUPS)
def test_models_in_turns_give_the_same_bits_again_on_every_rank(computed: Any, layout: str) -> None:
    first, _ = computed(layout)[0]
    for results, _ in computed(layout):
        assert results.keys() == first.keys()
        for name, tensor in results.items():
            assert torch.equal(tensor, first[f"{name.rpartition('/')[0]}/0"]), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", GROUPS)
def test_each_model_has_the_degrees_that_its_heads_allow(computed: Any, layout: str) -> None:
    for _, facts in computed(layout):
        assert facts["degrees"] == {str(heads): degrees for heads, degrees in mixed_heads.GROUPS[layout].items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "made"),
    [
        ("ulysses=2", 0),  # a ring of two is the same ranks as Ulysses on two
        ("ulysses=4", 2),  # two pairs that exchange heads, and two that are a ring; this rank is in one of each
        pytest.param("ulysses=2,ring=2", 2, marks=pytest.mark.long),  # the ring of four, and each rank alone
        ("ulysses=2,cfg=2", 0),
    ],
)
def test_groups_are_made_once(computed: Any, layout: str, made: int) -> None:
    for _, facts in computed(layout):
        assert facts["groups"] - facts["groups at start"] == made
        assert facts["groups after lending all again"] == facts["groups"]
        assert facts["new descriptors"] <= 0  # what the process was forked with is closed some time


@pytest.mark.slow
@pytest.mark.parametrize("layout", GROUPS)
def test_no_group_has_a_timeout_of_its_own(computed: Any, layout: str) -> None:
    for _, facts in computed(layout):
        assert facts["timeouts"] == [str(GROUP_TIMEOUT)]


@pytest.mark.parametrize(
    ("stride", "size", "sequence", "world_size", "members"),
    [
        (1, 2, 4, 4, [[0, 1], [2, 3]]),
        (2, 2, 4, 4, [[0, 2], [1, 3]]),
        (1, 4, 4, 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, 3, 6, 6, [[0, 2, 4], [1, 3, 5]]),
        (3, 2, 6, 12, [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]),
        (1, 1, 2, 4, [[0], [1], [2], [3]]),
    ],
)
def test_the_ranks_of_each_group(
    stride: int, size: int, sequence: int, world_size: int, members: list[list[int]]
) -> None:
    split = sequence_groups._Split(stride, size)
    assert list(sequence_groups._members(split, sequence, world_size)) == members


@pytest.mark.parametrize("degrees", [Degrees(ulysses=ulysses, ring=12 // ulysses) for ulysses in (1, 2, 3, 4, 6, 12)])
def test_ranks_are_ordered_as_in_yunchang(degrees: Degrees, monkeypatch: pytest.MonkeyPatch) -> None:
    from yunchang import globals as yunchang

    theirs: list[list[int]] = []
    monkeypatch.setattr(torch.distributed, "new_group", theirs.append)
    monkeypatch.setattr(yunchang, "PROCESS_GROUP", ModuleType("nothing is kept"))
    yunchang.set_seq_parallel_pg(degrees.ulysses, degrees.ring, rank=0, world_size=24)
    ours = [
        ranks
        for split in (sequence_groups._ulysses(degrees), sequence_groups._ring(degrees))
        for ranks in sequence_groups._members(split, degrees.sequence, 24)
    ]
    assert sorted(ours) == sorted(theirs)


def test_the_degrees_in_use_do_not_change(layout: ParallelLayout) -> None:
    from xfuser.core.distributed import get_sp_group

    before = vars(get_sp_group()).copy()
    sequence_groups.use(layout.degrees)
    assert vars(get_sp_group()) == before
