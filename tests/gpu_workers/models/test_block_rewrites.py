"""Rewritten graphs compute the same, and only what may be rewritten is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from xditd.gpu_workers.models.block_graphs import BlockGraph, TensorKind, Value
from xditd.gpu_workers.models.block_rewrites import rewrite
from xditd.gpu_workers.models.product_operator import OPERATOR

TOKENS, WIDTH, WIDER = 64, 64, 256


def kind(*shape: int, dtype: torch.dtype, device: str) -> TensorKind:
    return replace(TensorKind.of(torch.empty(shape, dtype=dtype)), device=torch.device(device))


def feed_forward(
    dtype: torch.dtype = torch.bfloat16, device: str = "cuda", approximate: str = "tanh", extra: Value | None = None
) -> BlockGraph:
    """Return the graph of a linear layer of three dimensions, and GELU; ``extra`` is another result."""
    operations: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("aten.view.default", [Value(0), [TOKENS, WIDTH]], {}),
        ("aten.t.default", [Value(1)], {}),
        ("aten.addmm.default", [Value(2), Value(3), Value(4)], {}),
        ("aten.view.default", [Value(5), [1, TOKENS, WIDER]], {}),
        ("aten.gelu.default", [Value(6)], {"approximate": approximate}),
    ]
    shapes = ((1, TOKENS, WIDTH), (WIDER, WIDTH), (WIDER,))
    results = [Value(7), *([] if extra is None else [extra])]
    return BlockGraph([kind(*each, dtype=dtype, device=device) for each in shapes], operations, results)


def rotary(factors: torch.dtype = torch.complex64, extra: Value | None = None) -> BlockGraph:
    """Return the graph of a rotary embedding by complex numbers, as Qwen-Image has it."""
    operations: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("aten.view.default", [Value(0), [1, TOKENS, 2, WIDTH // 2, 2]], {}),
        ("aten.view_as_complex.default", [Value(2)], {}),
        ("aten.unsqueeze.default", [Value(1), 1], {}),
        ("aten.mul.Tensor", [Value(3), Value(4)], {}),
        ("aten.view_as_real.default", [Value(5)], {}),
    ]
    given = [
        kind(1, TOKENS, 2, WIDTH, dtype=torch.float32, device="cpu"),
        kind(TOKENS, WIDTH // 2, dtype=factors, device="cpu"),
    ]
    return BlockGraph(given, operations, [Value(6), *([] if extra is None else [extra])])


def names(graph: BlockGraph, *, rewritten: bool) -> list[str]:
    module = graph.to_torch()
    if rewritten:
        rewrite(module, graph.inputs)
    return [str(node.target).split(".")[1] for node in module.graph.nodes if node.op == "call_function"]


def test_a_product_computes_the_gelu_that_alone_reads_it() -> None:
    graph = feed_forward()
    module = graph.to_torch()
    rewrite(module, graph.inputs)
    (product,) = [node for node in module.graph.nodes if node.target == OPERATOR]
    assert names(graph, rewritten=True) == ["view", "t", "dense_product", "view"]
    assert product.args[-1] is True


def test_products_of_layers_are_the_operator_s() -> None:
    graph = feed_forward(approximate="none")
    assert names(graph, rewritten=True) == ["view", "t", "dense_product", "view", "gelu"]


@pytest.mark.gpu
def test_a_product_with_gelu_rounds_once_less() -> None:
    graph = feed_forward()
    given = [torch.randn(each.shape, device="cuda", dtype=each.dtype) for each in graph.inputs]
    module = graph.to_torch()
    (expected,) = module(*given)
    rewrite(module, graph.inputs)
    (found,) = module(*given)
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert 0 < error < 5e-3


def test_rotations_are_computed_in_real_numbers() -> None:
    graph = rotary()
    assert "view_as_complex" in names(graph, rewritten=False)
    assert "view_as_complex" not in names(graph, rewritten=True)
    given = [torch.randn(each.shape, dtype=each.dtype) for each in graph.inputs]
    module = graph.to_torch()
    (expected,) = module(*given)
    rewrite(module, graph.inputs)
    (found,) = module(*given)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "graph",
    [
        feed_forward(dtype=torch.float32),
        feed_forward(device="cpu"),
        rotary(factors=torch.float32),
        rotary(extra=Value(5)),
    ],
    ids=["float32", "cpu", "real factors", "numbers are read"],
)
def test_other_graphs_stay(graph: BlockGraph) -> None:
    assert names(graph, rewritten=True) == names(graph, rewritten=False)


@pytest.mark.parametrize(
    "graph",
    [feed_forward(approximate="none"), feed_forward(extra=Value(5)), feed_forward(extra=Value(6))],
    ids=["erf", "the product is read", "its view is read"],
)
def test_other_gelus_stay(graph: BlockGraph) -> None:
    assert "gelu" in names(graph, rewritten=True)
