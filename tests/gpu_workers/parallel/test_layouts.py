"""Every kind of layout on gloo ranks against plain diffusers in one process, and the parts that they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked_programs import ProgramServer, load_program
from safetensors.torch import load_file

from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.parallel import ring
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.degrees import Degrees, parse_layout
from xditd.ipc.errors import Unsupported

BAR = 1e-6
CPU = torch.device("cpu")
PROGRAM = Path(__file__).with_name("many_layouts.py")
many_layouts = load_program(PROGRAM)


@pytest.fixture(scope="module")
def computed(
    tmp_path_factory: pytest.TempPathFactory, fork_program: ProgramServer
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What each rank of each layout got."""
    folder = tmp_path_factory.mktemp("layouts")
    done = fork_program(PROGRAM, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        layout: [
            load_file(folder / layout / f"rank{rank}.safetensors")
            for rank in range(Degrees(**parse_layout(layout)).world_size)
        ]
        for layout in many_layouts.LAYOUTS
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """One forward of plain diffusers for each case."""
    from diffusers import FluxPipeline

    from xditd.client.demo import checkpoints

    model = reference.transformer_from(checkpoints.flux1_state_dict(many_layouts.SEED, **many_layouts.MODEL))
    found = {}
    for case, (tokens, height, width, rows) in many_layouts.CASES.items():
        given = many_layouts.inputs(tokens, height, width, rows)
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
        found[case] = FluxPipeline._unpack_latents(packed, height * 8, width * 8, 8)
    return found | {name: torch.cat([found[case] for case in cases]) for name, cases in many_layouts.JOINED.items()}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("layout", many_layouts.LAYOUTS)
def test_a_layout_agrees_with_plain_diffusers(computed: Any, expected: Any, layout: str) -> None:
    for case, reference_rows in expected.items():
        for row, right in enumerate(reference_rows):
            error = reference.relative_error(computed[layout][0][f"{case}/0"][row], right)
            assert error <= BAR, f"{case}, row {row}: {error:.2e}"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("layout", many_layouts.LAYOUTS)
def test_a_layout_gives_the_same_bits_again(computed: Any, layout: str) -> None:
    for results in computed[layout]:
        for case in (*many_layouts.CASES, *many_layouts.JOINED):
            assert torch.equal(results[f"{case}/0"], results[f"{case}/1"]), case


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("layout", many_layouts.LAYOUTS)
def test_every_rank_gets_every_row(computed: Any, layout: str) -> None:
    first, *others = computed[layout]
    for results in others:
        assert all(torch.equal(results[name], tensor) for name, tensor in first.items())


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("layout", many_layouts.LAYOUTS)
def test_a_step_cache_spares_the_same_steps_of_every_row(computed: Any, layout: str) -> None:
    rows = many_layouts.CASES["odd text, three rows"][-1]
    assert computed[layout][0]["reused"] == rows * (len(many_layouts.ALIKE) - 1)
    whole = computed[many_layouts.LAYOUTS[0]][0]["cached"]
    assert reference.relative_error(computed[layout][0]["cached"], whole) <= BAR


@pytest.mark.usefixtures("layout")
def test_rows_are_partitioned_once() -> None:
    from xditd.gpu_workers.parallel.row_partition import partition_rows

    assert [partition_rows(1, 2, half) for half in (0, 1)] == [slice(0, 1), slice(0, 1)]  # both do the one row
    assert [partition_rows(3, 2, half) for half in (0, 1)] == [slice(0, 2), slice(2, 3)]
    for rows in range(2, 9):
        dealt = [row for half in (0, 1) for row in range(rows)[partition_rows(rows, 2, half)]]
        assert dealt == list(range(rows))


def test_the_place_of_a_rank_in_its_layout() -> None:
    degrees = Degrees(ulysses=2, ring=2, cfg=2)
    placed = [ParallelLayout(rank, degrees, CPU, "SDPA") for rank in range(8)]
    assert [layout.sequence_rank for layout in placed] == [0, 1, 2, 3] * 2
    assert [layout.half for layout in placed] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("cut", [1, 9, 31])
def test_parts_merge_to_the_whole(cut: int) -> None:
    query, key, value = torch.randn(3, 2, 3, 32, 128, generator=torch.Generator().manual_seed(1))
    key = key * 4  # so that parts differ much in weight
    run = ring.with_log_sum_exp("SDPA", CPU)
    parts = [run(query, key[:, :, part], value[:, :, part]) for part in (slice(cut), slice(cut, None))]
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    merged, log_sum_exp = ring.merge(*parts)
    assert reference.relative_error(merged, whole) <= BAR
    assert torch.allclose(log_sum_exp, run(query, key, value)[1])


@pytest.mark.usefixtures("layout")
def test_a_ring_chooses_a_kernel_that_returns_its_log_sum_exp() -> None:
    assert ring.choose_backend("auto", CPU) == "SDPA"
    assert ring.choose_backend("sdpa", CPU) == "SDPA"
    with pytest.raises(Unsupported, match="'SDPA_MATH' with ring attention: returns no log-sum-exp; use SDPA"):
        ring.choose_backend("SDPA_MATH", CPU)


def test_a_kernel_whose_log_sum_exp_is_of_another_base_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ring.with_log_sum_exp("SDPA", CPU)

    def base_two(*tensors: torch.Tensor) -> ring.Attended:
        attended, log_sum_exp = right(*tensors)
        return attended, log_sum_exp * 1.4427

    monkeypatch.setattr(ring, "with_log_sum_exp", lambda backend, device: base_two)
    assert "merges wrongly" in ring._probe("SDPA", CPU)
