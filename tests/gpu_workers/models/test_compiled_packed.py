"""Blocks with packed layers are compiled: their graphs hold an operator for each, and neither weights nor formats."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from gguf_files import random_blocks
from interpreted_graphs import InterpretedGraphs
from packed_checkpoints import pack
from torch.nn import functional

from xditd.client.packed_weights import packing_of_tensors
from xditd.gpu_workers.models.block_compiler import import_loaders
from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.gpu_workers.models.split_checks import computes_in_halves
from xditd.gpu_workers.packed.linear import PackedLinear, PackedMemory, pack_linears
from xditd.gpu_workers.packed.native_products import native_product
from xditd.gpu_workers.packed.tensors import PackedTensor

SIZE = 64
LAYERS = ("to_query", "up", "down")
CASES = (
    ("int8", False),
    ("int8_convrot", False),
    ("float8", False),
    ("q8_0", False),
    ("int8", True),
    ("int8_convrot", True),
    ("float8", True),
)
"""Formats, and whether their products are native."""


CPU = torch.device("cpu")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(SIZE)
        self.to_query = torch.nn.Linear(SIZE, SIZE)
        self.up = torch.nn.Linear(SIZE, 2 * SIZE, bias=False)
        self.down = torch.nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query, key = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.to_query(self.norm(x)), context))
        x = x + functional.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)
        return x + 0.1 * self.down(functional.gelu(self.up(self.norm(x)), approximate="tanh"))


class Model(torch.nn.Module):
    def __init__(self, blocks: int = 3, *, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block() for _ in range(blocks)])
        self.eval().requires_grad_(False).to(device, dtype)
        self.device = device
        self.memory = PackedMemory(device)
        self.memory.scratch.reserve("test", 2 * SIZE * SIZE * 4)
        targets = [f"blocks.{number}.{name}.weight" for number in range(blocks) for name in LAYERS]
        self.layers = pack_linears(self, dict.fromkeys(targets, dtype), self.memory)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            image = block(image, text)
        return image

    def plug(self, packed_format: str, *, is_native: bool, seed: int) -> None:
        """Give all layers other weights and biases."""
        for number, layer in enumerate(self.layers.values()):
            packed = moved(packed_weight(packed_format, layer, 100 * seed + number), self.device)
            layer.plug(replace(packed, native=native_product if is_native else None))
            if layer.bias is not None:
                bias = numbers(layer.out_features, seed=seed).to(layer.bias)
                layer._parameters["bias"] = torch.nn.Parameter(bias, requires_grad=False)

    @property
    def products(self) -> int:
        return sum(each.native + each.reference for each in self.memory.counts.report())


def packed_weight(packed_format: str, layer: PackedLinear, seed: int) -> PackedTensor:
    rows, columns = layer.out_features, layer.in_features
    if packed_format == "q8_0":
        return PackedTensor("q8_0", (rows, columns), random_blocks("q8_0", rows, columns, seed, spread=0.1))
    packed = pack({"a.weight": numbers(rows, columns, seed=seed) / 8}, packed_format, torch.float32)
    return PackedTensor.of(packing_of_tensors(packed.tensors).packed[0], packed.tensors)


def moved(packed: PackedTensor, device: torch.device) -> PackedTensor:
    fields = {"values": packed.values, "scale": packed.scale, "input_scale": packed.input_scale}
    return replace(packed, **{name: each.to(device) for name, each in fields.items() if each is not None})


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(tokens: int = 5) -> dict[str, torch.Tensor]:
    return {"image": numbers(1, tokens, SIZE), "text": numbers(1, 3, SIZE, seed=1)}


def wait_until_made(blocks: CompiledBlocks, key: str) -> None:
    end = time.monotonic() + 250
    while blocks.state(key).phase == "making":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert blocks.state(key).phase == "made", blocks.state(key)


def made(model: Model, graphs: InterpretedGraphs | CompiledGraphs) -> CompiledBlocks:
    found = CompiledBlocks.of(model, None, graphs)  # type: ignore[arg-type]
    assert isinstance(found, CompiledBlocks), found
    return found


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_one_graph_serves_all_blocks_formats_and_products() -> None:
    graphs, model = InterpretedGraphs(), Model()
    model.plug("int8", is_native=False, seed=0)
    blocks, call = made(model, graphs), partial(model, **arguments())
    expected = call()
    assert torch.equal(blocks.begin("a", call), expected)
    assert blocks.state("a").phase == "made", blocks.state("a")
    seen = []
    for seed, (packed_format, is_native) in enumerate(CASES):
        model.plug(packed_format, is_native=is_native, seed=seed)
        eager = call()
        before = model.products
        assert torch.equal(blocks.run("a", call), eager), packed_format
        assert model.products == before + len(model.layers), "each product counts once"
        assert not any(torch.equal(eager, each) for each in seen)
        seen.append(eager)
    assert (blocks.compiled, blocks.eager, len(graphs.made)) == (3 * len(CASES), 0, 1)


def test_layers_stay_as_they_were() -> None:
    graphs, model = InterpretedGraphs(), Model()
    model.plug("float8", is_native=False, seed=0)
    blocks, call = made(model, graphs), partial(model, **arguments())
    before = [list(vars(each)) for each in model.modules()]
    blocks.begin("a", call)
    blocks.run("a", call)
    with pytest.raises(RuntimeError):
        blocks.begin("b", lambda: model(numbers(1, 2, 3), numbers(1, 2, 3)))
    assert [list(vars(each)) for each in model.modules()] == before
    assert blocks.compiled == 3


def test_a_graph_holds_no_weight_and_no_bias_of_packed_layers() -> None:
    graphs, model = InterpretedGraphs(), Model()
    model.plug("int8_convrot", is_native=True, seed=0)
    blocks = made(model, graphs)
    blocks.begin("a", partial(model, **arguments()))
    (call,) = {each.name: each for each in blocks._calls.values() if not isinstance(each, str)}.values()
    assert call.recording.packed == LAYERS
    assert {name.path for name in call.recording.state} == {"norm"}


def test_a_fault_of_a_packed_layer_is_that_of_the_eager_forward() -> None:
    graphs, model = InterpretedGraphs(), Model()
    model.plug("int8", is_native=False, seed=0)
    blocks, call = made(model, graphs), partial(model, **arguments())
    blocks.begin("a", call)

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    layer = model.layers["blocks.1.up.weight"]
    layer.plug(replace(layer.packed, native=fail))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        blocks.run("a", call)
    model.plug("int8", is_native=False, seed=1)
    assert torch.equal(blocks.run("a", call), call())
    assert blocks.state("a").phase == "made"


def test_packed_weights_count_as_parameters_of_blocks_and_for_their_precision() -> None:
    model = Model()
    for layer in model.layers.values():
        layer._parameters["bias"] = None
    model.head = torch.nn.Sequential(*(torch.nn.LayerNorm(SIZE) for _ in range(4))).eval()
    assert isinstance(CompiledBlocks.of(model, None, InterpretedGraphs()), CompiledBlocks)  # type: ignore[arg-type]
    assert not computes_in_halves(model)
    for layer in model.layers.values():
        layer._placeholder = layer._placeholder.to(torch.bfloat16)
    assert computes_in_halves(model)


@pytest.mark.long
@pytest.mark.slow
def test_compiled_blocks_with_packed_layers_give_what_eager_ones_give(tmp_path: Path) -> None:
    import_loaders()
    graphs, model = CompiledGraphs(tmp_path / "graphs", torch.device("cpu")), Model()
    model.plug("int8", is_native=False, seed=0)
    blocks, call = made(model, graphs), partial(model, **arguments())
    blocks.begin("a", call)
    wait_until_made(blocks, "a")
    for seed, (packed_format, is_native) in enumerate(CASES):
        model.plug(packed_format, is_native=is_native, seed=seed)
        eager, found = call(), blocks.run("a", call)
        # Where inputs are rounded to eight bits, one that differs in its last bit may become the next number.
        limit = 1e-2 if is_native else 1e-6
        assert float((found - eager).norm() / eager.norm()) <= limit, (packed_format, is_native)
    assert (blocks.compiled, blocks.eager) == (3 * len(CASES), 0)
    assert len(graphs._states) == 1
    graphs.close()


@pytest.mark.gpu
def test_compiled_blocks_with_packed_layers_on_a_gpu(tmp_path: Path) -> None:
    import_loaders()
    device = torch.device("cuda:0")
    graphs = CompiledGraphs(tmp_path / "graphs", device)
    model = Model(device=device, dtype=torch.bfloat16)
    model.plug("int8", is_native=False, seed=0)
    given = {name: each.to(device, torch.bfloat16) for name, each in arguments(tokens=32).items()}
    blocks, call = made(model, graphs), partial(model, **given)
    blocks.begin("a", call)
    wait_until_made(blocks, "a")
    for seed, (packed_format, is_native) in enumerate(CASES):
        model.plug(packed_format, is_native=is_native, seed=seed)
        eager, found = call(), blocks.run("a", call)
        assert float((found - eager).norm() / eager.norm()) <= 2e-2, (packed_format, is_native)
    counted = {each.format: (each.native > 0, each.reference > 0) for each in model.memory.counts.report()}
    assert counted == dict.fromkeys(("int8", "int8_convrot", "float8"), (True, True)) | {"q8_0": (False, True)}
    assert (blocks.compiled, blocks.eager) == (3 * len(CASES), 0)
    graphs.close()
