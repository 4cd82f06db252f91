"""Which of ComfyUI's patches are LoRAs, and what is lent of them; ComfyUI's classes are imitated by their names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xditd.client.comfyui.lora_patches import Factors, find_loras, read_bypass, read_patches
from xditd.client.loras.lending import describe_lora
from xditd.ipc.limits import MAX_LORAS

SHAPE = (24, 16)


def imitated(module: str, name: str) -> Any:
    return type(name, (), {"__module__": module, "__init__": lambda self, **given: vars(self).update(given)})


LoRAAdapter = imitated("comfy.weight_adapter.lora", "LoRAAdapter")
LoHaAdapter = imitated("comfy.weight_adapter.loha", "LoHaAdapter")
Manager = imitated("comfy.weight_adapter.bypass", "BypassInjectionManager")


def swap_scale_shift(weight: torch.Tensor) -> torch.Tensor:
    first, second = weight.chunk(2)
    return torch.cat([second, first])


swap_scale_shift.__module__ = "comfy.utils"


def adapter(*more: Any, rows: int = 24, columns: int = 16, alpha: Any = 2.0, keys: Any = None, **given: Any) -> Any:
    up, down = given.get("up", torch.randn(rows, 4)), given.get("down", torch.randn(4, columns))
    weights = (up, down, alpha, *more, *[None] * (3 - len(more)))
    return LoRAAdapter(weights=weights, loaded_keys=set() if keys is None else keys)


def patch(value: Any, strength: Any = 0.5, *, model: float = 1.0, offset: Any = None, function: Any = None) -> tuple:
    return strength, value, model, offset, function


def difference(factors: list[Factors]) -> torch.Tensor:
    found = torch.zeros(SHAPE)
    for each in factors:
        first, last = each.rows
        start = each.start or 0
        found[start : start + last - first] += each.strength * each.scale * each.up[first:last] @ each.down
    return found


def test_what_a_lora_adds():
    whole, part, swapped = adapter(), adapter(rows=8, alpha=None), adapter()
    found = read_patches(
        [patch(whole), patch(part, -1.0, offset=(0, 16, 8)), patch(swapped, 1, function=swap_scale_shift)], SHAPE
    )
    assert found is not None
    right = 0.25 * whole.weights[0] @ whole.weights[1]
    right[16:] -= part.weights[0] @ part.weights[1]
    right += swap_scale_shift(0.5 * swapped.weights[0] @ swapped.weights[1])
    assert torch.allclose(difference(found), right, atol=1e-5)


NO_LORAS = {
    "a difference": patch(("diff", (torch.ones(SHAPE),))),
    "another adapter": patch(LoHaAdapter(weights=(), loaded_keys=set())),
    "a third factor": patch(adapter(torch.ones(4, 4))),
    "dora": patch(adapter(None, torch.ones(24))),
    "another shape": patch(adapter(None, None, [24, 32])),
    "a model strength": patch(adapter(), model=0.5),
    "columns": patch(adapter(rows=24, columns=8), offset=(1, 0, 8)),
    "rows outside": patch(adapter(rows=8), offset=(0, 20, 8)),
    "another function": patch(adapter(), function=torch.neg),
    "a function of a part": patch(adapter(rows=8), offset=(0, 0, 8), function=swap_scale_shift),
    "wrong rows": patch(adapter(rows=12)),
    "wrong columns": patch(adapter(columns=8)),
    "unequal ranks": patch(adapter(up=torch.ones(24, 3))),
    "another dtype": patch(adapter(up=torch.ones(24, 4, dtype=torch.float64))),
    "no number": patch(adapter(), strength=float("nan")),
    "an endless alpha": patch(adapter(alpha=float("inf"))),
    "too large a scale": patch(adapter(alpha=1e7)),
}


@pytest.mark.parametrize("what", NO_LORAS)
def test_what_is_merged(what):
    assert read_patches([NO_LORAS[what]], SHAPE) is None
    assert read_patches([patch(adapter()), NO_LORAS[what]], SHAPE) is None
    assert read_patches([patch(adapter())], SHAPE) is not None


def test_a_weight_that_is_no_matrix_is_merged():
    assert read_patches([patch(adapter())], (24,)) is None
    assert read_patches([patch(adapter())], (24, 16, 1, 1)) is None


def injection(adapters: dict[str, Any]) -> Any:
    manager = Manager(adapters=adapters)

    def inject(_: Any) -> None:
        assert manager

    return SimpleNamespace(inject=inject)


def test_bypass():
    """DoRA's magnitudes are ignored, as in ComfyUI."""
    dora = adapter(None, torch.ones(24))
    found = read_bypass([injection({"a.b": (dora, 0.7)})], lambda name: {"a.b.weight": SHAPE}[name])
    assert found is not None
    assert torch.allclose(difference(found["a.b.weight"]), 0.35 * dora.weights[0] @ dora.weights[1])


@pytest.mark.parametrize(
    "given",
    [
        SimpleNamespace(inject=print),
        injection({"a": (LoHaAdapter(weights=(), loaded_keys=set()), 1.0)}),
        injection({"a": (adapter(torch.ones(4, 4)), 1.0)}),
        injection({"a": (adapter(rows=12), 1.0)}),
    ],
)
def test_injections_that_are_no_loras(given):
    assert read_bypass([given], lambda _: SHAPE) is None


def read(*patches: Any) -> list[Factors]:
    found = read_patches(patches, SHAPE)
    assert found is not None
    return found


def test_each_load_and_strength_is_one_lora():
    one, other = {"one"}, {"other"}
    first, second = adapter(keys=one), adapter(keys=one)
    branches = {
        "a.weight": read(patch(first, 0.5), patch(adapter(keys=other), 0.5), patch(first, 0.5)),
        "b.weight": read(patch(second, 0.5), patch(second, 0.1)),
    }
    found = find_loras(branches, "model")
    assert sorted((each.strength, len(each.read.layers)) for each in found) == [(0.1, 1), (0.5, 1), (0.5, 1), (0.5, 2)]
    again = find_loras(
        {name: read(patch(each, 0.9)) for name, each in (("a.weight", first), ("b.weight", second))}, "model"
    )
    assert [each.key for each in again] == [next(each.key for each in found if len(each.read.layers) == 2)]
    first.weights[0].add_(1.0)  # written in place: other contents
    written = find_loras({"a.weight": read(patch(first)), "b.weight": read(patch(second))}, "model")
    assert written[0].key != again[0].key


def test_more_loads_than_a_job_may_name_become_few():
    patches = [patch(adapter(keys={number}), 0.01 * number) for number in range(MAX_LORAS + 1)]
    few = find_loras({f"layer.{number}.weight": read(each) for number, each in enumerate(patches)}, "model")
    assert [each.strength for each in few] == [1.0]
    assert [layer.scale for layer in few[0].read.layers] == pytest.approx([0.5 * each[0] for each in patches])


def test_what_is_lent_is_a_whole_lora():
    branches = {
        "transformer.blocks.0.qkv.weight": read(*[patch(adapter(rows=8), offset=(0, at, 8)) for at in (0, 8, 16)]),
        "blocks.1.out.weight": read(patch(adapter(up=torch.randn(24, 4, 1, 1), down=torch.randn(4, 16, 1, 1)))),
        "norm.weight": read(patch(adapter(), function=swap_scale_shift)),
    }
    (one, *others) = find_loras(branches, "model")
    offers = [describe_lora(each.read, label="test") for each in (one, *others)]
    try:
        layers = [layer for offer in offers for layer in offer.manifest.lora.layers]
        starts = sorted((layer.target, -1 if layer.start is None else layer.start) for layer in layers)
        assert starts == [
            ("blocks_0_qkv", 0), ("blocks_0_qkv", 8), ("blocks_0_qkv", 16), ("blocks_1_out", -1), ("norm", 0),
            ("norm", 12),
        ]  # fmt: skip
        assert {tuple(each.shape) for offer in offers for each in offer.manifest.tensors} == {
            (8, 4), (4, 16), (24, 4), (12, 4),
        }  # fmt: skip
    finally:
        for offer in offers:
            offer.close()
