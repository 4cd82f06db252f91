"""Rewritten graphs compute the same, and only what may be rewritten is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from xditd.gpu_workers.models.block_graphs import BlockGraph, TensorKind, Value
from xditd.gpu_workers.models.block_rewrites import fuse_gelu

TOKENS, WIDTH, WIDER = 6, 8, 32


def feed_forward(
    dtype: torch.dtype = torch.bfloat16, device: str = "cuda", approximate: str = "tanh", extra: Value | None = None
) -> BlockGraph:
    """Return the graph of a linear layer of three dimensions, and GELU; ``extra`` is another result."""

    def kind(*shape: int) -> TensorKind:
        return replace(TensorKind.of(torch.empty(shape, dtype=dtype)), device=torch.device(device))

    operations: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("aten.view.default", [Value(0), [TOKENS, WIDTH]], {}),
        ("aten.t.default", [Value(1)], {}),
        ("aten.addmm.default", [Value(2), Value(3), Value(4)], {}),
        ("aten.view.default", [Value(5), [1, TOKENS, WIDER]], {}),
        ("aten.gelu.default", [Value(6)], {"approximate": approximate}),
    ]
    results = [Value(7), *([] if extra is None else [extra])]
    return BlockGraph([kind(1, TOKENS, WIDTH), kind(WIDER, WIDTH), kind(WIDER)], operations, results)


def names(graph: BlockGraph) -> list[str]:
    return [name.split(".")[1] for name, _, _ in graph.operations]


def test_a_product_computes_the_gelu_that_alone_reads_it() -> None:
    graph, before = feed_forward(), feed_forward()
    fuse_gelu(graph)
    assert names(graph) == ["view", "t", "_addmm_activation", "view", "alias"]
    given = [torch.randn(each.shape) for each in graph.inputs]
    (found,), (expected,) = graph.to_torch()(*given), before.to_torch()(*given)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert BlockGraph.decode(graph.encode()) == graph


@pytest.mark.parametrize(
    "graph",
    [
        feed_forward(dtype=torch.float32),
        feed_forward(device="cpu"),
        feed_forward(approximate="none"),
        feed_forward(extra=Value(5)),
        feed_forward(extra=Value(6)),
    ],
    ids=["float32", "cpu", "erf", "the product is read", "its view is read"],
)
def test_other_graphs_stay(graph: BlockGraph) -> None:
    before = names(graph)
    fuse_gelu(graph)
    assert names(graph) == before
