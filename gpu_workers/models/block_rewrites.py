"""Rewrite recorded graphs where a library's kernel does what the compiler would write a kernel for."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import torch

from xditd.gpu_workers.models.block_graphs import BlockGraph, Value, map_values

_VIEWS: Final = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
_HALVES: Final = (torch.bfloat16, torch.float16)


def fuse_gelu(graph: BlockGraph) -> None:
    """Let products whose results go to GELU (tanh) alone compute it, as cuBLAS does in its epilogue.

    A kernel of its own reads and writes four times the width of the model for each token. In half precision on GPUs
    only; elsewhere there is no such epilogue.
    """
    first = len(graph.inputs)
    uses: Counter[int] = Counter()

    def count(value: Value) -> Value:
        uses[value.place] += 1
        return value

    map_values((graph.operations, graph.results), count)
    for number, (name, args, kwargs) in enumerate(graph.operations):
        if name != "aten.gelu.default" or kwargs.get("approximate") != "tanh":
            continue
        place = args[0].place
        while uses[place] == 1 and place >= first and graph.operations[place - first][0] in _VIEWS:
            place = graph.operations[place - first][1][0].place
        if place < first or uses[place] != 1 or not _is_half_product(graph, *graph.operations[place - first]):
            continue
        graph.operations[place - first] = (
            "aten._addmm_activation.default", graph.operations[place - first][1], {"use_gelu": True},
        )  # fmt: skip
        graph.operations[number] = ("aten.alias.default", [args[0]], {})


def _is_half_product(graph: BlockGraph, name: str, args: list[Any], kwargs: dict[str, Any]) -> bool:
    if name != "aten.addmm.default" or kwargs or args[0].place >= len(graph.inputs):
        return False
    bias = graph.inputs[args[0].place]
    return bias.device.type == "cuda" and bias.dtype in _HALVES and len(bias.shape) == 1
