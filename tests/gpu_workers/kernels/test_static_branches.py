"""LoRAs in memory that graphs read: one graph serves other LoRAs and strengths of the same layers and padded ranks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import factor_copy_cases
import pytest
import torch
import torch.nn.functional as F
from taped_forward import TapedForward

from xditd.gpu_workers.kernels import static_branches
from xditd.gpu_workers.kernels.branched_products import BranchedProducts, BranchTable, Part
from xditd.gpu_workers.kernels.branches import Branch, Strength
from xditd.gpu_workers.kernels.products import SixteenBit
from xditd.gpu_workers.kernels.stacked_layout import StackedLayout
from xditd.gpu_workers.kernels.static_branches import StaticBranches

HERE = Path(__file__).parent
WIDTH, HIDDEN = 12, 20
LAYERS = {"one": (2 * HIDDEN, WIDTH), "two": (WIDTH, WIDTH + HIDDEN), "norm": (WIDTH, WIDTH)}


class Lora:
    """A LoRA of some layers, as a model has it."""

    def __init__(self, number: int, rank: int, layers: tuple[str, ...] = ("one", "two"), scale: float = 0.5) -> None:
        torch.manual_seed(number)
        self.number, self.strength = number, Strength(number)
        self.slots: Any = None
        self.branches = {
            name: [
                Branch(
                    torch.randn(rank, LAYERS[name][1]) / 4,
                    torch.randn(LAYERS[name][0], rank) / rank,
                    scale,
                    self.strength,
                )
            ]
            for name in layers
        }


class Blocks:
    """Products of a block whose projections have branches, and what they are without any code of ours."""

    def __init__(self, max_bytes: int | None = None) -> None:
        torch.manual_seed(0)
        self.state = {f"{name}.weight": torch.randn(shape) / 4 for name, shape in LAYERS.items()}
        self.state |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in LAYERS.items()}
        products = SixteenBit()
        products.load(self.state)
        parts = [Part("one", 0, HIDDEN), Part("one", HIDDEN, 2 * HIDDEN), Part("two", 0, WIDTH), Part("norm", 0, WIDTH)]
        self.table = BranchTable(parts, {name: (name, 0) for name in LAYERS})
        self.products = BranchedProducts(products, self.table)
        self.gone: list[int] = []
        self.agreed: list[bool] = []
        places = self.table.places(("one", "two"))
        self.static = StaticBranches(StackedLayout, places, self.agree, self.gone.append, max_bytes)

    def agree(self, ok: bool) -> bool:
        self.agreed.append(ok)
        return ok

    def switch(self, *loras: tuple[Lora, float]) -> Any:
        """Switch LoRAs on as a job does, and return their layout."""
        for branches in (each.branches for each in self.table.places(LAYERS)):
            branches.active = ()
        for lora, strength in loras:
            lora.strength.value = strength
            lora.slots = lora.slots or self.table.slots(lora.branches)  # once, as a job does
            for branches, added in lora.slots:
                branches.active += added
        self.products.layout = self.static.use(tuple((lora.number, value) for lora, value in loras if value))
        return self.products.layout

    def forward(self, given: Any) -> torch.Tensor:
        rows, out = given["rows"], torch.empty(given["rows"].shape[0], WIDTH)
        first = torch.empty(rows.shape[0], HIDDEN)
        last = slice(HIDDEN, None)
        self.products.multiply(rows, self.products.linear("one", slice(0, HIDDEN)), first)
        attended = (rows + first[:, :WIDTH]).tanh()
        self.products.mlp_and_attention(
            attended, rows, self.products.linear("one", last), self.products.linear("two"), out
        )
        return out

    def expected(self, rows: torch.Tensor, *loras: tuple[Lora, float]) -> torch.Tensor:
        wide = {name: each.double() for name, each in self.state.items()}
        for lora, strength in loras:
            for name, branches in lora.branches.items():
                for each in branches:
                    wide[f"{name}.weight"] += strength * each.scale * each.up.double() @ each.down.double()
        hidden = F.linear(rows.double(), wide["one.weight"], wide["one.bias"])
        attended = (rows.double() + hidden[:, :WIDTH]).tanh()
        both = torch.cat([attended, F.gelu(hidden[:, HIDDEN:], approximate="tanh")], 1)
        return F.linear(both, wide["two.weight"], wide["two.bias"])


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found.double() - expected).norm() / expected.norm()) <= 1e-6


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_one_graph_serves_other_loras_strengths_and_stacks_of_the_same_layout() -> None:
    blocks = Blocks()
    first, second, third = Lora(1, 16), Lora(2, 9), Lora(3, 7)
    layout = blocks.switch((first, 0.8))
    check(blocks.forward({"rows": rows()}), blocks.expected(rows(), (first, 0.8)))
    graph = TapedForward(blocks.forward, {"rows": rows()})
    for seed, loras in enumerate(
        [((first, 0.8),), ((first, -1.7),), ((second, 0.5),), ((second, 0.3), (third, -0.4)), ((third, 1.0),)]
    ):
        assert blocks.switch(*loras) is layout
        check(graph.run({"rows": rows(seed)}), blocks.expected(rows(seed), *loras))
        assert torch.equal(graph.replay_last(), blocks.forward({"rows": rows(seed)}))
    counts = blocks.static.counts
    assert (counts.layouts, counts.copies, counts.refusal, blocks.gone) == (1, 5, "", [])


def test_a_switch_copies_factors_and_strengths_alone_copy_half_of_them_and_nothing_new_copies_nothing() -> None:
    blocks, lora = Blocks(), Lora(1, 16)
    blocks.switch((lora, 0.8))
    counts = blocks.static.counts
    ups, downs = 16 * (2 * HIDDEN + WIDTH) * 4, 16 * (WIDTH + WIDTH + HIDDEN) * 4  # layer one: down is copied once
    assert counts.copied_bytes == ups + downs
    blocks.switch((lora, 0.8))
    assert counts.copied_bytes == ups + downs
    blocks.switch((lora, 0.4))
    assert counts.copied_bytes == ups + 2 * downs
    assert blocks.static.nbytes == ups + downs


def test_other_layers_or_ranks_are_another_layout() -> None:
    blocks = Blocks()
    first = blocks.switch((Lora(1, 4), 1.0))
    kept = [Lora(2, 16), Lora(3, 17), Lora(4, 4, ("two",)), Lora(5, 4, scale=2.0)]
    found = [blocks.switch((lora, 1.0)) for lora in kept]
    assert found[0] is found[3]
    assert len({each.serial for each in (first, *found)}) == 4  # the first one went with its LoRA
    assert blocks.gone == [first.serial]
    assert found[1].title == "LoRAs of rank 32"
    graph_rows = {"rows": rows()}
    blocks.switch((kept[2], 0.7))
    check(blocks.forward(graph_rows), blocks.expected(rows(), (kept[2], 0.7)))


def test_a_lora_of_strength_0_leaves_the_bits_of_the_others() -> None:
    blocks, first, second = Blocks(), Lora(1, 16), Lora(2, 16)
    alone = blocks.switch((first, 0.8))
    expected = blocks.forward({"rows": rows()})
    assert blocks.switch((second, 0.0), (first, 0.8)) is alone
    assert torch.equal(blocks.forward({"rows": rows()}), expected)


def test_memory_is_bounded_and_what_is_too_large_says_so() -> None:
    one = 16 * (2 * HIDDEN + 2 * WIDTH + WIDTH + HIDDEN) * 4
    blocks = Blocks(max_bytes=one)
    loras = [Lora(1, 16), Lora(2, 16, ("two",)), Lora(3, 17)]
    first = blocks.switch((loras[0], 1.0))
    second = blocks.switch((loras[1], 1.0))
    assert (blocks.gone, blocks.static.nbytes) == ([first.serial], second.nbytes)
    assert blocks.switch((loras[2], 1.0)) is None
    assert blocks.static.counts.refusal.startswith("factors of ")
    check(blocks.forward({"rows": rows()}), blocks.expected(rows(), (loras[2], 1.0)))  # added one by one
    huge = Lora(4, 1025)
    assert Blocks().switch((huge, 1.0)) is None
    for each in (loras[0], loras[0]):
        assert blocks.switch((each, 1.0)) is not None
    assert blocks.static.counts.refusal == ""


def test_no_more_layouts_stay_than_allowed() -> None:
    blocks = Blocks()
    loras = [Lora(number, rank) for number, rank in enumerate((16, 32, 48, 64, 96), 1)]
    serials = [blocks.switch((lora, 1.0)).serial for lora in loras]
    assert blocks.gone == serials[: len(loras) - static_branches.MAX_LAYOUTS]


def test_memory_goes_with_the_last_lora_of_its_layout() -> None:
    blocks, loras = Blocks(), [Lora(1, 16), Lora(2, 12)]
    layout = blocks.switch((loras[0], 1.0))
    serial, memory = layout.serial, weakref.ref(layout.memory)
    blocks.switch((loras[1], 1.0))
    factor = weakref.ref(loras[0].branches["one"][0].down)
    blocks.switch()
    layout = None
    loras.pop(0)
    gc.collect()
    assert factor() is None, "a copy keeps no lent memory"
    assert blocks.gone == []
    loras.clear()
    gc.collect()
    assert (blocks.gone, blocks.static.nbytes, memory()) == ([serial], 0, None)


def test_ranks_that_do_not_all_have_a_layout_make_it_anew() -> None:
    blocks, first, second = Blocks(), Lora(1, 16), Lora(2, 16)
    before = blocks.switch((first, 1.0))
    blocks.static._agree = lambda ok: blocks.agree(ok) and len(blocks.agreed) != 3
    blocks.agreed.clear()
    assert blocks.switch((second, 1.0)) is before
    assert blocks.agreed == [True]
    blocks.agreed[:] = [True, True]
    after = blocks.switch((first, 1.0))  # another rank says no once
    assert after is not before
    assert blocks.gone == [before.serial]
    check(blocks.forward({"rows": rows()}), blocks.expected(rows(), (first, 1.0)))


def test_without_memory_on_some_rank_all_add_branches_one_by_one() -> None:
    blocks, lora = Blocks(), Lora(1, 16)
    blocks.static._agree = lambda _: False
    assert blocks.switch((lora, 1.0)) is None
    assert blocks.static.counts.refusal == "the GPU has no room for their factors"
    check(blocks.forward({"rows": rows()}), blocks.expected(rows(), (lora, 1.0)))


def test_200_switches_among_20_loras_make_one_layout() -> None:
    blocks, loras = Blocks(), [Lora(number, 4 + number % 12) for number in range(1, 21)]
    blocks.switch((loras[0], 1.0))
    graph = TapedForward(blocks.forward, {"rows": rows()})
    size = blocks.static.nbytes
    for turn in range(200):
        given = ((loras[7 * turn % 20], 0.1 * (turn % 9) - 0.4 or 1.0),)
        blocks.switch(*given)
        if turn % 10 == 3:
            check(graph.run({"rows": rows(turn)}), blocks.expected(rows(turn), *given))
    assert blocks.static.counts.layouts == 1
    assert blocks.static.nbytes == size


@pytest.mark.slow
def test_in_the_interpreter_copies_are_those_of_torch() -> None:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent / "support"), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(HERE / "interpreted_copies.py")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", factor_copy_cases.DTYPES)
def test_on_gpus_copies_are_those_of_torch(dtype: torch.dtype) -> None:
    factor_copy_cases.check_copies(dtype, "cuda")
