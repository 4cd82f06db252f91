"""Captured forwards of a class with LoRAs: PEFT's bits, and one graph for all LoRAs of the same layers and ranks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from taped_forward import TapedForward

from xditd.gpu_workers.kernels.branches import Branch, Strength
from xditd.gpu_workers.kernels.static_branches import Place
from xditd.gpu_workers.models import path_choice
from xditd.gpu_workers.models.class_branches import branches_of
from xditd.gpu_workers.models.class_layout import SeparateLayout
from xditd.gpu_workers.models.forward_paths import RUNS_BEFORE, ForwardPaths
from xditd.gpu_workers.models.graph_loras import GraphLoras
from xditd.gpu_workers.models.split_checks import CaseKey
from xditd.gpu_workers.packed.linear import PackedLinear, PackedMemory
from xditd.gpu_workers.parallel.rank_sync import RankSet

WIDTH = 32
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)
        self.plain = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x) + self.last(F.gelu(self.first(x)))


class Lora:
    """A LoRA of some layers, as a model has it."""

    def __init__(
        self, number: int, rank: int, device: str, layers: tuple[str, ...] = ("first", "last"),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        made = torch.Generator().manual_seed(number)
        self.strength = Strength(number)
        self.branches = {}
        for name in layers:
            inputs, outputs = {"first": (WIDTH, 2 * WIDTH), "last": (2 * WIDTH, WIDTH)}[name]
            down, up = torch.randn(rank, inputs, generator=made), torch.randn(outputs, rank, generator=made)
            down, up = down.to(device, dtype), (up / 4).to(device, dtype)
            self.branches[name] = Branch(down, up, 0.37, self.strength)


class Calls:
    """A module with its paths and LoRAs, as a job calls them."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch, mode: str = "captured") -> None:
        torch.manual_seed(0)
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.module: Any = Block().to(self.device, torch.bfloat16).eval().requires_grad_(False)
        self.paths = ForwardPaths(self.module, "Tested", self.device, mode, is_leader=True)
        if device == "cpu":
            monkeypatch.setattr(path_choice, "CapturedForward", TapedForward)
            self.paths._chooser.captures = mode in ("captured", "auto")
        self.paths.use_weights("a", dict(self.module.named_parameters()))
        self.branches = branches_of(self.module)
        places = [Place(each, self.module.get_submodule(path).out_features) for path, each in self.branches.items()]
        self.loras = GraphLoras(SeparateLayout, lambda: places, self.paths, RankSet.GROUP)

    @contextmanager
    def switched_on(self, *uses: tuple[Lora, float]) -> Iterator[None]:
        for lora, strength in uses:
            lora.strength.value = strength
            for name, each in lora.branches.items():
                self.branches[name].active += (each,)
        yield
        for branches in self.branches.values():
            branches.active = ()

    @torch.no_grad()
    def run(self, seed: int, *uses: tuple[Lora, float]) -> torch.Tensor:
        arguments = {"x": rows(self.device, seed)}
        key = CaseKey.of("forward", None, arguments, 1)

        def forward(given: Mapping[str, Any]) -> Any:
            return self.module(**given)

        with self.switched_on(*uses):
            layout = self.loras.use(tuple((lora.strength.number, strength) for lora, strength in uses if strength), 1)
            if layout is None:
                found = forward(arguments)
            else:
                found = self.loras.run(layout, key, arguments, forward, forward, on_all_ranks=False)
        self.paths.decide()
        assert all(type(each) is torch.nn.Linear for each in self.module.children())
        return found

    @torch.no_grad()
    def expected(self, seed: int, *uses: tuple[Lora, float]) -> torch.Tensor:
        """What the eager branches give, whose bits are those of PEFT."""
        with self.switched_on(*uses):
            return self.module(rows(self.device, seed))


def rows(device: torch.device, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(2, 7, WIDTH, generator=made).to(device, torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_serves_other_loras_and_strengths_with_the_bits_of_peft(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(device, monkeypatch)
    first, second = Lora(1, 8, device), Lora(2, 8, device)
    for seed, use in enumerate(
        [(first, 0.8), (first, 0.8), (first, 0.8), (second, -1.3), (first, 0.3), (second, 0.3), (second, 0.7)]
    ):
        assert torch.equal(calls.run(seed, use), calls.expected(seed, use)), seed
    counts = calls.loras.counts
    assert (counts.forwards, counts.launched, counts.layouts) == (7, 7 - RUNS_BEFORE, 1)
    one = sum(each.nbytes for branch in first.branches.values() for each in (branch.down, branch.up))
    assert counts.copied_bytes == 4 * one  # two LoRAs in turn; strengths alone copy no factor
    reports = calls.paths.take_reports()
    assert [(each.path, each.shapes.split(":")[0]) for each in reports] == [("captured", "LoRAs of rank 8")]
    assert calls.loras.detail == ""


@pytest.mark.parametrize("device", DEVICES)
def test_several_loras_and_other_ranks_have_graphs_of_their_own(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(device, monkeypatch)
    loras = [Lora(1, 8, device), Lora(2, 4, device, ("last",)), Lora(3, 5, device)]
    combinations = [
        ((loras[0], 0.5), (loras[1], -0.25)),
        ((loras[2], 1.0),),
        ((loras[1], 0.0), (loras[2], 1.0)),  # as without the first one
    ]
    for seed in range(4):
        for uses in combinations:
            assert torch.equal(calls.run(seed, *uses), calls.expected(seed, *uses))
    assert calls.loras.counts.layouts == 2
    assert calls.loras.counts.launched == 12 - 2 * RUNS_BEFORE
    plain = calls.expected(0)
    assert torch.equal(calls.run(0), plain)


@pytest.mark.parametrize("device", DEVICES)
def test_200_switches_among_20_loras_are_right_and_memory_goes_with_them(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(device, monkeypatch)
    loras = [Lora(number, 8, device) for number in range(1, 21)]
    for turn in range(200):
        use = (loras[7 * turn % 20], 0.1 * (turn % 7) + 0.1)
        found = calls.run(turn % 5, use)
        if turn % 9 == 0:
            assert torch.equal(found, calls.expected(turn % 5, use))
    counts = calls.loras.counts
    assert (counts.layouts, counts.launched) == (1, 200 - RUNS_BEFORE)
    (layout,) = calls.loras._static._layouts.values()
    memory, factor = weakref.ref(layout.memory), weakref.ref(loras[0].branches["first"].down)
    assert calls.loras.nbytes == layout.memory.nbytes
    layout = use = None
    loras.clear()
    gc.collect()
    assert (calls.loras.nbytes, memory(), factor()) == (0, None, None)
    assert not any(key[1].layout for cases in calls.paths._cases.values() for key in cases)


def test_what_has_no_layout_is_eager_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls("cpu", monkeypatch)
    mixed = ((Lora(1, 8, "cpu"), 0.5), (Lora(2, 8, "cpu", dtype=torch.float32), 0.5))
    for seed in range(4):
        assert torch.equal(calls.run(seed, *mixed), calls.expected(seed, *mixed))
    assert calls.loras.detail == "forwards with LoRAs are eager: factors of several dtypes"
    assert calls.loras.counts.launched == 0
    packed = PackedLinear(torch.nn.Linear(4, 4), torch.bfloat16, PackedMemory(torch.device("cpu")))
    strength = Strength(3)
    strength.value = 1.0
    packed.branches.active = (Branch(torch.zeros(2, 4), torch.zeros(4, 2), 1.0, strength),)
    loras = GraphLoras(SeparateLayout, lambda: [Place(packed.branches, 4)], calls.paths, RankSet.GROUP)
    assert loras.use(((3, 1.0),), 1) is None
    assert loras.detail.endswith("layers with packed weights add their branches kernel by kernel")


def test_blocks_with_loras_are_not_compiled_in_auto_and_not_captured_in_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    auto = Calls("cpu", monkeypatch, "auto")
    auto.paths._chooser.compiles = True
    lora = Lora(1, 8, "cpu")
    for seed in range(RUNS_BEFORE):
        auto.run(seed, (lora, 1.0))
    (report,) = auto.paths.take_reports()
    assert (report.path, report.detail) == ("captured", "compiled blocks have no branches of LoRAs")
    assert auto.loras.detail == "compiled blocks have no branches: forwards with LoRAs may be captured alone"
    compiled = Calls("cpu", monkeypatch, "compiled")
    assert torch.equal(compiled.run(0, (lora, 1.0)), compiled.expected(0, (lora, 1.0)))
    assert compiled.loras.detail == "forwards with LoRAs are eager: compiled blocks have no branches"
    assert compiled.loras.counts.forwards == 1
