"""Captured forwards of a family's module with LoRAs in its own layers, plain and packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from taped_forward import TapedForward

from xditd.gpu_workers.kernels.branches import Branch, Strength
from xditd.gpu_workers.kernels.stacked_layout import StackedLayout
from xditd.gpu_workers.kernels.static_branches import Place
from xditd.gpu_workers.models import path_choice
from xditd.gpu_workers.models.forward_paths import RUNS_BEFORE, ForwardPaths
from xditd.gpu_workers.models.graph_loras import GraphLoras
from xditd.gpu_workers.models.split_checks import CaseKey
from xditd.gpu_workers.packed.linear import PackedLinear, PackedMemory, add_branches_to
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.gpu_workers.parallel.rank_sync import RankSet

WIDTH = 32


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(F.gelu(self.first(x)))


def packed_block() -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a block whose last layer is packed, and its weights as they are dequantised."""
    torch.manual_seed(0)
    module: Any = Block().eval().requires_grad_(False)
    values = torch.randint(-127, 128, (WIDTH, 2 * WIDTH), dtype=torch.int8)
    scale = torch.rand(WIDTH, 1) / 400
    module.last = PackedLinear(module.last, torch.float32, PackedMemory(torch.device("cpu")))
    module.last.memory.scratch.reserve("test", module.last.scratch_bytes)
    module.last.plug(PackedTensor("int8", (WIDTH, 2 * WIDTH), values, scale))
    return module, {"first": module.first.weight.clone(), "last": values.float() * scale}


def test_one_graph_serves_loras_of_plain_and_packed_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, weights = packed_block()
    monkeypatch.setattr(path_choice, "CapturedForward", TapedForward)
    paths = ForwardPaths(module, "Tested", torch.device("cpu"), "captured", is_leader=True)
    paths._chooser.captures = True
    paths.use_weights("a", dict(module.named_parameters()))
    branches = add_branches_to(module)
    places = [Place(each, getattr(module, path).out_features) for path, each in branches.items()]
    loras = GraphLoras(StackedLayout, lambda: places, paths, RankSet.GROUP)
    lent: dict[int, tuple[Strength, dict[str, Branch]]] = {}
    for number, rank in ((1, 4), (2, 9), (3, 12)):
        strength = Strength(number)
        lent[number] = (
            strength,
            {
                name: Branch(
                    torch.randn(rank, weight.shape[1]) / 8, torch.randn(weight.shape[0], rank) / 8, 0.5, strength
                )
                for name, weight in weights.items()
            },
        )

    def forward(given: Mapping[str, Any]) -> torch.Tensor:
        return module(**given)

    def run(seed: int, *uses: tuple[int, float]) -> torch.Tensor:
        arguments = {"x": torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))}
        for number, value in uses:
            lent[number][0].value = value
            for name, each in lent[number][1].items():
                branches[name].active += (each,)
        layout = loras.use(uses)
        assert layout is not None
        key = CaseKey.of("forward", None, arguments, 1)
        found = loras.run(layout, key, arguments, forward, forward, on_all_ranks=False)
        for each in branches.values():
            assert each.pair is None
            each.active = ()
        paths.decide()
        changed = {name: weight.double() for name, weight in weights.items()}
        for number, value in uses:
            for name, branch in lent[number][1].items():
                changed[name] += value * branch.scale * branch.up.double() @ branch.down.double()
        x = arguments["x"].double()
        hidden = F.gelu(F.linear(x, changed["first"], module.first.bias.double()))
        expected = x + F.linear(hidden, changed["last"], module.last.bias.double())
        assert float((found - expected).norm() / expected.norm()) <= 1e-6
        return found

    with torch.no_grad():
        for seed, uses in enumerate([((1, 0.7),), ((2, -0.4),), ((3, 1.2),), ((1, 0.5), (2, 0.5)), ((1, -2.0),)]):
            run(seed, *uses)
    counts = loras.counts
    assert (counts.forwards, counts.launched, counts.layouts) == (5, 5 - RUNS_BEFORE, 1)
    assert [each.path for each in paths.take_reports()] == ["captured"]
    loras.clear()
    assert loras.nbytes == 0
    assert not any(key[1].layout for cases in paths._cases.values() for key in cases)


def test_factors_of_several_dtypes_have_no_layout() -> None:
    """Those beside float32 layers of a module in half precision: a layout has one dtype."""
    strength = Strength(1)
    strength.value = 0.5
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=torch.bfloat16), torch.nn.Linear(4, 4))
    branches = add_branches_to(module)
    for each, layer in zip(branches.values(), module, strict=True):
        dtype = layer.weight.dtype
        each.active = (Branch(torch.ones(2, 4, dtype=dtype), torch.ones(4, 2, dtype=dtype), 1.0, strength),)
    assert StackedLayout.find([Place(each, 4) for each in branches.values()]) == "factors of several dtypes"
    branches["1"].active = ()
    assert not isinstance(StackedLayout.find([Place(each, 4) for each in branches.values()]), str)
