"""Several LoRAs of a projection are one pair of factors; one kernel multiplies and adds a branch."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import branch_cases
import pytest
import torch
import torch.nn.functional as F

from xditd.gpu_workers.kernels import branch_kernels, branched_products, dense_products
from xditd.gpu_workers.kernels.branch_stacks import BranchStacks
from xditd.gpu_workers.kernels.branched_products import BranchedProducts, BranchTable, Part
from xditd.gpu_workers.kernels.branches import Branch, Branches, Strength
from xditd.gpu_workers.kernels.products import SixteenBit

HERE = Path(__file__).parent
WIDTH, HIDDEN = 12, 20


def strength_of(value: float) -> Strength:
    strength = Strength()
    strength.value = value
    return strength


def branch(rank: int, strength: Strength, *, start: int = 0, rows: int = HIDDEN, scale: float = 1.0) -> Branch:
    return Branch(torch.randn(rank, WIDTH), torch.randn(rows, rank), scale, strength, start)


def expected_of(x: torch.Tensor, branches: tuple[Branch, ...]) -> torch.Tensor:
    found = torch.zeros(x.shape[0], HIDDEN)
    for each in branches:
        found[:, each.start : each.stop] += each.scale * each.strength.value * (x @ each.down.t() @ each.up.t())
    return found


def sum_of(stacks: BranchStacks, place: Branches, x: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(x.shape[0], HIDDEN)
    for pair in stacks.pairs(place, HIDDEN):
        low = x @ pair.down.t() * (1.0 if pair.scales is None else pair.scales)
        found[:, pair.start : pair.start + pair.up.shape[0]] += pair.alpha * (low @ pair.up.t())
    return found


def test_several_loras_are_one_pair_whose_strengths_change_without_a_copy() -> None:
    torch.manual_seed(1)
    stacks, place, x = BranchStacks(), Branches(), torch.randn(4, WIDTH)
    first, second = strength_of(0.5), strength_of(-0.25)
    place.active = (branch(3, first), branch(2, second, start=5, rows=7, scale=2.0))
    (pair,) = stacks.pairs(place, HIDDEN)
    assert pair.down.shape == (5, WIDTH)
    torch.testing.assert_close(sum_of(stacks, place, x), expected_of(x, place.active))
    size, first.value = stacks.nbytes, 0.75
    (again,) = stacks.pairs(place, HIDDEN)
    assert (again.down is pair.down, again.up is pair.up, stacks.nbytes) == (True, True, size)
    torch.testing.assert_close(sum_of(stacks, place, x), expected_of(x, place.active))
    place.active = place.active[:1]  # another combination, and back
    assert stacks.pairs(place, HIDDEN)[0].up is place.active[0].up
    assert stacks.nbytes == size


def test_beside_a_strength_of_0_nothing_is_stacked() -> None:
    stacks, place = BranchStacks(), Branches()
    place.active = (branch(3, strength_of(0.0)), branch(2, strength_of(0.5)), branch(2, strength_of(0.25)))
    assert [pair.alpha for pair in stacks.pairs(place, HIDDEN)] == [0.5, 0.25]
    assert stacks.nbytes == 0


def test_stacks_go_with_the_first_of_their_loras() -> None:
    stacks, place = BranchStacks(), Branches()
    kept, gone = strength_of(0.5), strength_of(0.25)
    place.active = (branch(3, kept), branch(2, gone))
    factor = weakref.ref(place.active[1].down)
    stacks.pairs(place, HIDDEN)
    assert stacks.nbytes == 5 * (WIDTH + HIDDEN) * 4
    place.active = ()
    del gone
    gc.collect()
    assert stacks.nbytes == 0
    assert factor() is None


def test_memory_of_stacks_is_bounded() -> None:
    torch.manual_seed(2)
    one, x = 5 * (WIDTH + HIDDEN) * 4, torch.randn(4, WIDTH)
    stacks, place = BranchStacks(max_bytes=one), Branches()
    sets = [(branch(3, strength_of(0.5)), branch(2, strength_of(0.25))) for _ in range(3)]
    for place.active in sets:
        assert len(stacks.pairs(place, HIDDEN)) == 1
        assert stacks.nbytes == one
    place.active = (*sets[0], branch(1, strength_of(1.0)))  # too large: branch by branch
    assert len(stacks.pairs(place, HIDDEN)) == 3
    torch.testing.assert_close(sum_of(stacks, place, x), expected_of(x, place.active))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_of_the_same_rows_share_what_the_factor_makes_of_them(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    state = {
        "one.weight": torch.randn(2 * HIDDEN, WIDTH, dtype=dtype) / WIDTH**0.5,
        "one.bias": torch.randn(2 * HIDDEN, dtype=dtype),
        "two.weight": torch.randn(WIDTH, WIDTH + HIDDEN, dtype=dtype) / WIDTH**0.5,
        "two.bias": torch.randn(WIDTH, dtype=dtype),
    }
    products = SixteenBit()
    products.load(state)
    parts = [Part("one", 0, HIDDEN), Part("one", HIDDEN, 2 * HIDDEN), Part("two", 0, WIDTH)]
    table = BranchTable(parts, {"one": ("one", 0), "two": ("two", 0)})
    branched = BranchedProducts(products, table)
    down, up = torch.randn(3, WIDTH, dtype=dtype) / WIDTH**0.5, torch.randn(2 * HIDDEN, 3, dtype=dtype)
    other = Branch(torch.randn(2, WIDTH, dtype=dtype) / WIDTH**0.5, torch.randn(2 * HIDDEN, 2, dtype=dtype), 1.0,
                   strength_of(-0.3))  # fmt: skip
    loras = [Branch(down, up, 0.5, strength_of(0.8)), other]
    for place, added in table.slots({"one": loras}):
        place.active += added
    rows, attended = torch.randn(6, WIDTH, dtype=dtype), torch.randn(6, WIDTH, dtype=dtype)
    first, out = torch.empty(6, HIDDEN, dtype=dtype), torch.empty(6, WIDTH, dtype=dtype)
    branched.multiply(rows, branched.linear("one", slice(0, HIDDEN)), first)
    low = branched._last
    assert low is not None
    kept = low.low.clone()
    low.low.mul_(2.0)  # what the second projection takes is this
    doubled = torch.empty(6, HIDDEN, dtype=dtype)
    branched.multiply(rows, branched.linear("one", slice(HIDDEN, None)), doubled)
    low.low.copy_(kept)
    branched.mlp_and_attention(attended, rows, branched.linear("one", slice(HIDDEN, None)), branched.linear("two"), out)

    wide = {name: tensor.double() for name, tensor in state.items()}
    added = sum(
        each.scale * each.strength.value * (rows.double() @ each.down.double().t() @ each.up.double().t())
        for each in loras
    )
    base = rows.double() @ wide["one.weight"].t() + wide["one.bias"]
    hidden = F.gelu((base + added)[:, HIDDEN:], approximate="tanh")
    last = torch.cat([attended.double(), hidden], 1) @ wide["two.weight"].t() + wide["two.bias"]
    bar = 1e-6 if dtype == torch.float32 else 1e-2
    for found, expected in (
        (first, (base + added)[:, :HIDDEN]),
        (doubled, (base + 2 * added)[:, HIDDEN:]),
        (out, last),
    ):
        assert float((found.double() - expected).norm() / expected.norm()) <= bar
    assert branched._last is None


def test_branches_that_are_not_stacked_are_added_one_by_one() -> None:
    torch.manual_seed(5)
    state = {"up.weight": torch.randn(HIDDEN, WIDTH), "up.bias": torch.randn(HIDDEN)}
    state |= {"down.weight": torch.randn(WIDTH, HIDDEN), "down.bias": torch.randn(WIDTH)}
    products = SixteenBit()
    products.load(state)
    table = BranchTable([Part("up", 0, HIDDEN), Part("down", 0, WIDTH)], {})
    table.stacks = BranchStacks(max_bytes=0)
    branched = BranchedProducts(products, table)
    whole, part = branch(3, strength_of(0.5)), branch(2, strength_of(-0.25), start=5, rows=7)
    rows, out = torch.randn(6, WIDTH), torch.empty(6, WIDTH)
    for active in ((whole, part), (part, whole), (part,)):
        table.at("up").active = active
        assert len(table.stacks.pairs(table.at("up"), HIDDEN)) == len(active)
        branched.mlp(rows, branched.linear("up"), branched.linear("down"), out)
        inner = F.linear(rows, state["up.weight"], state["up.bias"]) + expected_of(rows, active)
        expected = F.linear(F.gelu(inner, approximate="tanh"), state["down.weight"], state["down.bias"])
        assert float((out - expected).norm() / expected.norm()) <= 1e-6


def test_gelu_stays_part_of_a_product_that_has_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    state = {"up.weight": torch.randn(HIDDEN, WIDTH), "up.bias": torch.randn(HIDDEN)}
    state |= {"down.weight": torch.randn(WIDTH, HIDDEN), "down.bias": torch.randn(WIDTH)}
    products = SixteenBit()
    products.load(state)
    table = BranchTable([Part("up", 0, HIDDEN), Part("down", 0, WIDTH)], {})
    branched = BranchedProducts(products, table)
    lora = Branch(torch.randn(2, HIDDEN), torch.randn(WIDTH, 2), 1.0, strength_of(0.5))
    table.at("down").active = (lora,)
    calls = []
    multiply = dense_products.multiply
    for module in (branched_products, dense_products):
        monkeypatch.setattr(
            module, "multiply", lambda *given, **more: (calls.append(more), multiply(*given, **more))[1]
        )
    rows, out = torch.randn(6, WIDTH), torch.empty(6, WIDTH)
    branched.mlp(rows, branched.linear("up"), branched.linear("down"), out)
    hidden = F.gelu(F.linear(rows, state["up.weight"], state["up.bias"]), approximate="tanh")
    expected = F.linear(hidden, state["down.weight"] + 0.5 * lora.up @ lora.down, state["down.bias"])
    assert float((out - expected).norm() / expected.norm()) <= 1e-6
    assert [each.get("gelu") for each in calls] == [True]


@pytest.mark.slow
def test_in_the_interpreter_a_product_with_a_branch_is_that_of_the_reference() -> None:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent / "support"), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(HERE / "interpreted_branches.py")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", branch_cases.DTYPES)
@pytest.mark.parametrize("shape", [*branch_cases.SHAPES, (4608, 3072, 9216, 16), (1000, 3072, 12288, 64)])
def test_on_gpus_a_product_with_a_branch_is_that_of_the_reference(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    need_hopper()
    branch_cases.check_multiply_with_branch(shape, dtype, "cuda")


@pytest.mark.gpu
def test_on_gpus_the_kernel_is_taken_for_shapes_that_fill_it() -> None:
    need_hopper()

    def takes(rows: int, outputs: int, rank: int) -> bool:
        x, up, out = (
            torch.empty(each, device="cuda", dtype=torch.bfloat16)
            for each in ((rows, 3072), (outputs, rank), (rows, outputs))
        )
        weight = torch.empty(outputs, 3072, device="cuda", dtype=torch.bfloat16).t()
        return branch_kernels.can_multiply(x, weight, out[0], up, out)

    assert takes(4096, 9216, 16)
    assert takes(4096, 9216, 64)
    assert not takes(4096, 9216, 72)
    assert not takes(4096, 9216, 12)  # rows of 24 bytes
    assert not takes(512, 9216, 16)  # the second round of tiles would be nearly empty


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", branch_cases.DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_on_gpus_a_product_adds_itself_to_what_is_there(dtype: torch.dtype, gelu: bool) -> None:
    torch.manual_seed(7)
    x, weight, out = (torch.randn(each, device="cuda", dtype=dtype) for each in ((300, 128), (264, 128), (300, 264)))
    exact = out.double() + x.double() @ weight.double().t()
    dense_products.add_product(x, weight.t(), out, gelu=gelu)
    expected = F.gelu(exact, approximate="tanh") if gelu else exact
    assert float((out.double() - expected).norm() / expected.norm()) <= branch_cases.ROUNDED[dtype]


def need_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for GPUs of compute capability 9.0")


@pytest.mark.parametrize("wrong", [lambda out: out.zero_(), lambda _: (_ for _ in ()).throw(RuntimeError("no"))])
def test_a_kernel_that_is_wrong_or_does_not_compile_is_not_taken(monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    monkeypatch.setattr(branch_kernels, "multiply_with_branch", lambda *given, **_: wrong(given[5]))
    assert not branch_kernels._is_right.__wrapped__(torch.bfloat16, torch.device("cpu"))


def test_a_kernel_that_is_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(x, weight, bias, low, up, out, *, gelu) -> None:
        found = x.float() @ weight.float() + bias.float() + low.float() @ up.float().t()
        out.copy_(F.gelu(found, approximate="tanh") if gelu else found)

    monkeypatch.setattr(branch_kernels, "multiply_with_branch", multiply)
    assert branch_kernels._is_right.__wrapped__(torch.bfloat16, torch.device("cpu"))
