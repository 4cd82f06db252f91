"""Layers with the same input: quantised once where that is the same, with the bits of separate calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_checkpoints import pack

from xditd.client.packed_weights import packing_of_tensors
from xditd.gpu_workers.packed import native_products
from xditd.gpu_workers.packed.linear import PackedLinear, PackedMemory
from xditd.gpu_workers.packed.native_products import native_product
from xditd.gpu_workers.packed.shared_inputs import WithProjections, project_all
from xditd.gpu_workers.packed.tensors import PackedTensor

NAMES = ("to_q", "to_k", "to_v")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The quantisations of inputs since the test began."""
    found: list[str] = []
    for name in ("quantise_int8", "quantise_float8"):
        original = getattr(native_products, name)

        def count(*given: object, name: str = name, original: object = original) -> object:
            found.append(name)
            return original(*given)  # type: ignore[operator]

        monkeypatch.setattr(native_products, name, count)
    return found


def attention(packed_format: str, *, is_native: bool = True) -> torch.nn.Module:
    memory = PackedMemory(torch.device("cpu"))
    memory.scratch.reserve("test", 96 * 64 * 4)
    module = torch.nn.Module()
    for seed, name in enumerate(NAMES):
        plain = torch.randn(96, 64, generator=torch.Generator().manual_seed(seed))
        made = pack({"a.weight": plain}, packed_format, torch.float32)
        if packed_format == "float8" and seed == 0:
            made.tensors.pop("a.input_scale")
        packed = PackedTensor.of(packing_of_tensors(made.tensors).packed[0], made.tensors)
        layer = PackedLinear(torch.nn.Linear(64, 96), torch.float32, memory)
        layer.plug(replace(packed, native=native_product if is_native else None))
        setattr(module, name, layer)
    return module.requires_grad_(False)


@pytest.mark.parametrize(
    ("packed_format", "is_native", "quantised"),
    [
        ("int8_convrot", True, ["quantise_int8"]),
        ("int8", True, ["quantise_int8"]),
        ("int8", False, []),
        ("float8", True, 3 * ["quantise_float8"]),  # two of them have a scale of their own for the input
        ("plain", True, ["quantise_float8"]),
    ],
)
def test_an_input_is_quantised_once_with_the_bits_of_separate_calls(
    counted: list[str], packed_format: str, is_native: bool, quantised: list[str]
) -> None:
    layers = attention(packed_format, is_native=is_native)
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(9))
    apart = [getattr(layers, name)(x) for name in NAMES]
    counted.clear()
    found = project_all([getattr(layers, name) for name in NAMES], x)
    assert counted == quantised
    assert [torch.equal(mine, its) for mine, its in zip(found, apart, strict=True)] == [True] * len(NAMES)
    assert sum(each.native for each in layers.to_q.memory.counts.report()) == (6 if is_native else 0)


def test_layers_that_are_not_packed_are_called() -> None:
    layers = [torch.nn.Linear(4, 3), torch.nn.Linear(4, 5)]
    x = torch.randn(2, 4)
    first, second = project_all(layers, x)
    assert torch.equal(first, layers[0](x))
    assert torch.equal(second, layers[1](x))


def test_a_processor_gets_the_results_from_the_layer_that_it_calls() -> None:
    layers = attention("int8")
    layers.heads = 3
    x = torch.randn(7, 64)
    seen = WithProjections(layers, NAMES, x)
    assert torch.equal(seen.to_k(x), layers.to_k(x))
    assert seen.heads == 3
