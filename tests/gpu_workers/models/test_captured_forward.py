"""Forwards as CUDA graphs: the bits of the eager forward for other arguments, and refusals that leave all as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from xditd.gpu_workers.models import forward_paths
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.split_checks import CaseKey
from xditd.gpu_workers.packed.counts import PackedProductCounts
from xditd.gpu_workers.packed.linear import PackedLinear, PackedMemory
from xditd.gpu_workers.packed.tensors import PackedTensor

pytestmark = pytest.mark.gpu

WIDTH = 64


class Block(torch.nn.Module):
    """A forward as those of models: products, attention, a table that is made on the host for each size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, scale: torch.Tensor, times: float = 1.0) -> dict[str, Any]:
        if self.table is None or len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype).to(x.device)
        query, key, value = (
            each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.first(x * scale * times).chunk(3, -1)
        )
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        positions = torch.linspace(0, 1, x.shape[1], dtype=x.dtype).to(x.device)[:, None]
        factor = torch.tensor([0.5, 2.0], device=x.device, dtype=x.dtype).sum()
        return {"sample": self.last(found) + self.table[:, None] * positions * factor, "kept": [found, "a text"]}


class Calls:
    """A module with its paths, as a job calls them."""

    def __init__(
        self, module: torch.nn.Module, mode: str = "captured", counts: PackedProductCounts | None = None
    ) -> None:
        self.module = module.cuda().bfloat16().eval().requires_grad_(False)
        self.eager_calls = 0
        self.paths = ForwardPaths(self.module, "Tested", torch.device("cuda", 0), mode, is_leader=True, counts=counts)
        self.lend("a")

    def lend(self, owner: str) -> dict[str, torch.Tensor]:
        tensors = dict(self.module.named_parameters())
        self.paths.use_weights(owner, tensors)
        return tensors

    def eager(self, arguments: Mapping[str, Any]) -> Any:
        self.eager_calls += 1
        return self.module(**arguments)

    @torch.no_grad()
    def run(self, **arguments: Any) -> Any:
        key = CaseKey.of("forward", None, arguments, 1)
        result = self.paths.run(key, arguments, self.eager, lambda given: self.module(**given), on_all_ranks=False)
        self.paths.decide()
        return result

    def reports(self) -> list[tuple[str, str]]:
        return [(each.path, each.detail) for each in self.paths.take_reports()]


def inputs(tokens: int = 32, seed: int = 0) -> dict[str, Any]:
    made = torch.Generator("cuda").manual_seed(seed)
    return {
        "x": torch.randn(1, tokens, WIDTH, generator=made, device="cuda", dtype=torch.bfloat16),
        "scale": torch.rand(1, generator=made, device="cuda", dtype=torch.bfloat16),
    }


def check_same(found: Any, expected: Any) -> None:
    assert torch.equal(found["sample"], expected["sample"])
    assert torch.equal(found["kept"][0], expected["kept"][0])
    assert found["kept"][1] == "a text"


def test_a_graph_gives_the_bits_of_the_class_for_other_arguments() -> None:
    calls = Calls(Block())
    results = [(calls.run(**inputs(seed=seed)), inputs(seed=seed)) for seed in range(6)]
    assert calls.eager_calls == forward_paths.RUNS_BEFORE
    assert calls.reports() == [("captured", "")]
    for found, given in results:  # no later run has changed an earlier result
        check_same(found, calls.module(**given))


def test_another_size_is_another_graph_and_the_first_one_keeps_its_table() -> None:
    calls = Calls(Block())
    for tokens in (32, 32, 32, 48, 48, 48):  # a forward that has made another table is not compared
        check_same(calls.run(**inputs(tokens)), calls.module(**inputs(tokens)))
    filler = [torch.randn(64, device="cuda") for _ in range(64)]  # into memory that an old table may have had
    for tokens in (32, 48):
        check_same(calls.run(**inputs(tokens, seed=3)), calls.module(**inputs(tokens, seed=3)))
    assert [path for path, _ in calls.reports()] == ["captured"] * 2
    assert len(filler) == 64


def test_numbers_are_part_of_a_graph_and_few_of_them_are_captured() -> None:
    calls = Calls(Block())
    for _ in range(3):
        for times in range(2 * forward_paths.MAX_VALUES):
            found = calls.run(**inputs(), times=float(times))
            check_same(found, calls.module(**inputs(), times=float(times)))
    assert len(calls.reports()) == forward_paths.MAX_VALUES


class Waits(torch.nn.Module):
    """Forwards for which the host waits, each in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.state = how, torch.nn.Linear(WIDTH, WIDTH), None

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> Any:
        found = self.layer(x)
        if self.how == "item":
            found = found * scale.item()
        elif self.how == "mask":
            found = found[found[..., 0] > 0]
        elif self.how == "if":
            found = found if scale > 2 else found * 2
        elif self.how == "to the host":
            found = found + scale.cpu().to(found.device)
        elif self.how == "writes":
            x.add_(1)
        elif self.how == "object":
            return {"sample": object()}
        elif self.how == "synchronizes":
            torch.cuda.synchronize()
        elif self.how == "waits unseen":
            torch.cuda.current_stream().synchronize()
        elif self.how == "changes the module":
            self.state = found
        elif self.how == "other bits":
            self.layer.weight.data.mul_(1.01)
        return {"sample": found}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("item", "_local_scalar_dense"),
        ("mask", "host waits"),
        ("if", "host waits"),
        ("to the host", "_to_copy"),
        ("writes", "writes to its arguments"),
        ("object", "holds objects"),
        ("synchronizes", "host waits"),
        ("waits unseen", "CUDA ended the capture"),
        ("changes the module", "change the module"),
        ("other bits", "other bits"),
    ],
)
def test_what_cannot_be_captured_stays_eager(how: str, reason: str) -> None:
    calls = Calls(Waits(how))
    for _ in range(4):
        calls.run(**inputs())
    ((path, why),) = calls.reports()
    assert path == "eager"
    assert reason in why
    assert calls.eager_calls == 4
    # The device and its memory are as before, also for other captures.
    after = Calls(Block())
    for seed in range(4):
        check_same(after.run(**inputs(seed=seed)), after.module(**inputs(seed=seed)))
    assert after.reports() == [("captured", "")]


def test_weights_are_swapped_and_each_has_its_graph() -> None:
    calls = Calls(Block())
    states = [{name: torch.randn_like(each) / 8 for name, each in calls.module.named_parameters()} for _ in range(2)]
    lent: list[dict[str, torch.Tensor]] = []
    for state in states:
        lent.append({name: torch.nn.Parameter(each, requires_grad=False) for name, each in state.items()})
    for turn, owner in enumerate([0, 0, 0, 1, 1, 0, 1, 0]):
        for name, each in lent[owner].items():
            module, _, last = name.rpartition(".")
            calls.module.get_submodule(module)._parameters[last] = each
        calls.paths.use_weights(str(owner), lent[owner])
        before = calls.eager_calls
        check_same(calls.run(**inputs(seed=turn)), calls.module(**inputs(seed=turn)))
        assert calls.eager_calls == before + (turn in (0, 1, 3)), "the second weights need one run alone"
    calls.run(**inputs())
    torch.cuda.synchronize()
    lent[1].clear()  # unmapped
    lent[0].clear()
    calls.lend("c")
    assert not any(calls.paths._cases.values())


def test_only_the_newest_graphs_stay() -> None:
    calls = Calls(Block())
    sizes = range(32, 32 + 2 * forward_paths.MAX_CAPTURED)
    for tokens in sizes:
        for _ in range(3):
            calls.run(**inputs(tokens))
    captured = [case for case in calls.paths._cases[False].values() if case.graph is not None]
    assert len(captured) == forward_paths.MAX_CAPTURED
    check_same(calls.run(**inputs(32)), calls.module(**inputs(32)))


def test_modes() -> None:
    eager = Calls(Block(), "eager")
    for _ in range(4):
        eager.run(**inputs())
    assert (eager.eager_calls, eager.reports()) == (4, [])
    # A forward of many small kernels waits for the host; auto takes that.
    auto = Calls(Block(), "auto")
    for _ in range(4):
        auto.run(**inputs())
    assert auto.reports() == [("captured", "it has no blocks to compile")]


def test_packed_layers_keep_the_memory_into_which_their_graph_dequantises() -> None:
    """Also when a larger model makes a larger buffer for all."""
    memory = PackedMemory(torch.device("cuda", 0))
    memory.scratch.reserve("small", WIDTH * WIDTH * 2)
    layers = [PackedLinear(torch.nn.Linear(WIDTH, WIDTH), torch.bfloat16, memory) for _ in range(2)]
    for seed, layer in enumerate(layers):
        made = torch.Generator("cuda").manual_seed(seed)
        values = torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8, device="cuda", generator=made)
        scale = torch.rand(WIDTH, 1, device="cuda", generator=made) / 400
        layer.plug(PackedTensor("int8", (WIDTH, WIDTH), values, scale))

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
            for layer in self.layers:
                x = layer(x * scale)
            return {"sample": x, "kept": [x, "a text"]}

    calls = Calls(Stack(), counts=memory.counts)
    for seed in range(3):
        check_same(calls.run(**inputs(seed=seed)), calls.module(**inputs(seed=seed)))
    assert calls.reports() == [("captured", "")]
    before = memory.counts.report()[0].reference
    calls.run(**inputs(seed=4))
    assert memory.counts.report()[0].reference == before + len(layers), "a replay counts its products"
    memory.scratch.reserve("large", 64 * WIDTH * WIDTH * 2)
    others = [torch.full((WIDTH, WIDTH), 3.0, device="cuda", dtype=torch.bfloat16) for _ in range(64)]
    check_same(calls.run(**inputs(seed=5)), calls.module(**inputs(seed=5)))
    assert calls.eager_calls == forward_paths.RUNS_BEFORE
    assert all(bool((each == 3.0).all()) for each in others), "a graph wrote to memory that is another's"
