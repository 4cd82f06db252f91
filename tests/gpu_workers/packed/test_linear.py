"""The reference forward of a packed layer has the bits of ``F.linear`` on the dequantised weight."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packed_checkpoints import pack

from xditd.client.packed_weights import packing_of_tensors
from xditd.gpu_workers.packed.linear import PackedLinear, PackedMemory, is_linear_weight, pack_linears
from xditd.gpu_workers.packed.scratch import ScratchBuffer
from xditd.gpu_workers.packed.tensors import PackedTensor

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def made(packed_format: str, seed: int = 0) -> tuple[PackedTensor, torch.Tensor]:
    plain = torch.randn(96, 64, generator=torch.Generator().manual_seed(seed))
    packed = pack({"a.weight": plain}, packed_format, BF16)
    return PackedTensor.of(packing_of_tensors(packed.tensors).packed[0], packed.tensors), packed.meant["a.weight"]


@pytest.fixture
def memory() -> PackedMemory:
    found = PackedMemory(CPU)
    found.scratch.reserve("test", 96 * 64 * 2)
    return found


def layer_of(memory: PackedMemory, *, bias: torch.Tensor | None) -> PackedLinear:
    linear = torch.nn.Linear(64, 96, bias=bias is not None, dtype=BF16)
    layer = PackedLinear(linear.requires_grad_(False), BF16, memory)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


@pytest.mark.parametrize("bias_dtype", [None, BF16, torch.float32], ids=str)
def test_the_bits_are_those_of_a_plain_product(memory: PackedMemory, bias_dtype: torch.dtype | None) -> None:
    bias = None if bias_dtype is None else torch.randn(96).to(bias_dtype)
    layer = layer_of(memory, bias=bias)
    packed, meant = made("int8_convrot")
    layer.plug(packed)
    x = torch.randn(2, 5, 64).to(BF16)
    expected = F.linear(x, meant, None if bias is None else bias.to(BF16))
    assert torch.equal(layer(x), expected)
    wide = layer(x.float())
    assert wide.dtype == torch.float32
    assert torch.equal(wide, F.linear(x.float(), meant.float(), None if bias is None else bias.float()))
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (meant.shape, BF16, CPU)


READS = {
    "product": lambda x, weight: F.linear(x, weight),
    "joined": lambda _, weight: torch.cat([weight.data, weight.detach()]),
    "rows": lambda _, weight: weight[3:5].float(),
    "attention": lambda _, weight: F.multi_head_attention_forward(
        torch.ones(2, 3, 64, dtype=BF16), torch.ones(2, 3, 64, dtype=BF16), torch.ones(2, 3, 64, dtype=BF16), 64, 4,
        None, torch.zeros(192, dtype=BF16), None, None, False, 0.0, weight[:64], None, use_separate_proj_weight=True,
        q_proj_weight=weight[:64], k_proj_weight=weight[:64], v_proj_weight=weight[32:],
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("read", READS)
def test_a_model_that_reads_the_weight_gets_its_values(memory: PackedMemory, read: str, mode: Any) -> None:
    """And not what memory holds: on the CPU a product with a tensor on meta is no error."""
    layer = layer_of(memory, bias=None)
    packed, meant = made("int8_rows")
    layer.plug(packed)
    x = torch.randn(5, 64).to(BF16)
    with mode():
        found = READS[read](x, layer.weight)
        assert torch.equal(found, READS[read](x, meant))
    assert type(found) is torch.Tensor
    (report,) = memory.counts.report()
    assert set(report.why_not_native) == {"the model's code reads the weight"}
    layer.unplug()
    assert layer.weight.is_meta


def test_layers_share_one_buffer(memory: PackedMemory) -> None:
    layers = [layer_of(memory, bias=None) for _ in range(2)]
    meant = []
    for seed, layer in enumerate(layers):
        packed, each = made("float8", seed)
        layer.plug(packed)
        meant.append(each)
    x = torch.randn(3, 64).to(BF16)
    for _ in range(2):
        for layer, weight in zip(layers, meant, strict=True):
            assert torch.equal(layer(x), F.linear(x, weight))
    assert layers[0].dequantised().data_ptr() == layers[1].dequantised().data_ptr()
    (report,) = memory.counts.report()
    assert (report.format, report.reference, report.native) == ("float8", 4, 0)


def test_a_native_product_runs_instead(memory: PackedMemory) -> None:
    layer = layer_of(memory, bias=None)
    packed, _ = made("int8")
    layer.plug(replace(packed, native=lambda x, weight, bias: x.new_full((1,), weight.shape[0])))
    assert layer(torch.ones(1, 64)).item() == 96
    (report,) = memory.counts.report()
    assert (report.reference, report.native) == (0, 1)


def test_unplugging_drops_the_lent_memory(memory: PackedMemory) -> None:
    layer = layer_of(memory, bias=None)
    packed, _ = made("nvfp4")
    watched = [weakref.ref(each.untyped_storage()) for each in packed.tensors]
    layer.plug(packed)
    layer(torch.ones(1, 64, dtype=BF16))
    layer.unplug()
    del packed
    gc.collect()
    assert not any(ref() for ref in watched)


def test_only_plain_linear_layers_are_replaced(memory: PackedMemory) -> None:
    class Other(torch.nn.Linear):
        pass

    module = torch.nn.Sequential(torch.nn.Linear(64, 96), Other(96, 96), torch.nn.LayerNorm(96))
    assert [is_linear_weight(module, f"{number}.weight") for number in range(3)] == [True, False, False]
    assert not is_linear_weight(module, "0.bias")
    found = pack_linears(module, {"0.weight": BF16}, memory)
    assert found == {"0.weight": module[0]}
    assert [name for name, _ in module.named_parameters()][:2] == ["0.bias", "1.weight"]


def test_the_buffer_grows_and_is_freed_with_its_last_user() -> None:
    scratch = ScratchBuffer(CPU)
    assert scratch.size_bytes == 0
    scratch.reserve("a", 64)
    first = scratch.view((4, 4), torch.float32)
    assert scratch.view((4, 4), torch.float32) is first
    scratch.reserve("b", 32)
    assert scratch.size_bytes == 64
    scratch.reserve("b", 128)
    assert scratch.size_bytes == 128
    assert scratch.view((4, 4), torch.float32).data_ptr() != first.data_ptr()
    scratch.release("a")
    scratch.release("a")
    assert scratch.size_bytes == 128
    scratch.release("b")
    assert scratch.size_bytes == 0
