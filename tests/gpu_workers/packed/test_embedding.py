"""Packed tables: looked up rows have the bits of the dequantised table, which is never made."""

from __future__ import annotations

import packed_checkpoints
import pytest
import torch
import torch.nn.functional as F

from xditd.client.packed_weights import packing_of_tensors
from xditd.gpu_workers.packed.dequantise import dequantise
from xditd.gpu_workers.packed.embedding import PackedEmbedding, can_look_up, pack_embeddings
from xditd.gpu_workers.packed.tensors import PackedTensor
from xditd.ipc.packed import GGUF_BLOCKS

ROWS, COLUMNS = 37, 256
CPU = torch.device("cpu")


def packed_table(packed_format: str) -> PackedTensor:
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(ROWS, COLUMNS, generator=generator)
    if packed_format in GGUF_BLOCKS:
        block = GGUF_BLOCKS[packed_format]
        values = torch.randint(0, 60, (ROWS, COLUMNS // block.numbers * block.size_bytes), generator=generator)
        return PackedTensor(packed_format, (ROWS, COLUMNS), values.to(torch.uint8))  # type: ignore[arg-type]
    made = packed_checkpoints.pack({"table.weight": plain}, packed_format, torch.float32)
    (described,) = packing_of_tensors(made.tensors).packed
    return PackedTensor.of(described, made.tensors)


def module_of(count: int = 1) -> torch.nn.Module:
    with torch.device("meta"):
        table = torch.nn.Embedding(ROWS, COLUMNS)
    return torch.nn.ModuleDict({f"table{number or ''}": table for number in range(count)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "packed_format", ["plain", "float8", "float8_e5m2", "old", "int8", "int8_rows", "int8_convrot", "q8_0", "q4_k"]
)
def test_rows_have_the_bits_of_the_dequantised_table(packed_format: str, dtype: torch.dtype) -> None:
    packed = packed_table(packed_format)
    whole = dequantise(packed, torch.empty(ROWS, COLUMNS, dtype=dtype))
    module = module_of()
    (layer,) = pack_embeddings(module, ["table.weight"], dtype, CPU).values()
    layer.plug(packed)
    for ids in (torch.arange(ROWS), torch.tensor([[3, 3, 36], [0, 1, 36]]), torch.tensor([[5]])):
        found = module.get_submodule("table")(ids)
        assert found.dtype == dtype
        assert torch.equal(found, F.embedding(ids, whole))
    assert f"packed={packed.format}" in repr(layer)
    layer.unplug()
    assert "nothing plugged" in repr(layer)


def test_a_table_in_two_places_is_replaced_in_both_and_its_hooks_stay() -> None:
    module = module_of(2)
    module.get_submodule("table").register_forward_hook(lambda _, __, result: result + 1)
    (layer,) = pack_embeddings(module, ["table.weight"], torch.float32, CPU).values()
    assert module.get_submodule("table") is module.get_submodule("table1") is layer
    packed = packed_table("plain")
    layer.plug(packed)
    ids = torch.tensor([4, 2])
    assert torch.equal(module.get_submodule("table1")(ids), packed.values[ids].float() + 1)


def test_its_weight_tells_the_shape_and_is_no_number() -> None:
    layer = PackedEmbedding(torch.nn.Embedding(ROWS, COLUMNS), torch.bfloat16, CPU)
    assert layer.weight.shape == (ROWS, COLUMNS)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.device == CPU
    assert layer.weight.untyped_storage().nbytes() == 2
    assert layer.weight.isnan().all()


def test_which_tables_can_be_looked_up() -> None:
    module = torch.nn.ModuleDict(
        {
            "table": torch.nn.Embedding(4, 8),
            "bounded": torch.nn.Embedding(4, 8, max_norm=1.0),
            "no": torch.nn.Linear(8, 4),
        }
    )
    assert can_look_up(module, "table.weight", "float8")
    assert not can_look_up(module, "table.weight", "nvfp4")
    assert not can_look_up(module, "bounded.weight", "float8")
    assert not can_look_up(module, "no.weight", "float8")
