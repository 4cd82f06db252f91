"""The form in which packed weights of ComfyUI's models are lent."""

from __future__ import annotations

import json

import packed_checkpoints
import pytest
import torch

from xditd.client import Unsupported
from xditd.client.comfyui.packed_tensors import LendableTensors, find_packed, is_mixed, lendable_tensors
from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.client.packed_markers import METADATA
from xditd.client.packed_weights import packing_of_tensors
from xditd.ipc.packed import PackedWeight

NAME = "double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return flux1_state_dict(1, heads=2, double_blocks=1, single_blocks=1, context_dim=64, pooled_dim=64)


def as_the_file(packed: PackedWeight) -> bool:
    return packed.quantises_input


def described(lendable: LendableTensors) -> dict[str, PackedWeight]:
    """What a lend recognises."""
    return {each.weight: each for each in packing_of_tensors({**lendable.tensors, **lendable.markers}).packed}


@pytest.mark.parametrize("in_metadata", [False, True], ids=["markers", "header"])
@pytest.mark.parametrize("format", packed_checkpoints.FORMATS)
def test_a_lend_recognises_what_the_file_says(format, in_metadata, state):
    made = packed_checkpoints.pack(state, format, torch.bfloat16, in_metadata=in_metadata)
    packing = find_packed(made.tensors, "x", made.metadata.get(METADATA))
    lendable = lendable_tensors(made.tensors, packing, as_the_file)
    assert described(lendable) == lendable.packed
    assert set(lendable.packed) == set(made.weights)
    for each in packing.packed:
        ours = lendable.packed[each.weight]
        assert (ours.format, ours.shape, ours.group) == (each.format, each.shape, each.group)
        assert ours.quantises_input == each.quantises_input
        assert lendable.tensors[each.weight] is made.tensors[each.weight]  # the same memory
        for role, name in each.companions.items():
            mine = lendable.tensors[ours.companions[role]]
            assert torch.equal(mine.float().flatten(), made.tensors[name].float().flatten())
    assert is_mixed(packing) == (format != "plain")
    logical = lendable.logical(torch.bfloat16)
    assert {name: tuple(each.shape) for name, each in logical.items()} == {
        name: tuple(each.shape) for name, each in state.items()
    }


@pytest.mark.parametrize("format", ["float8", "old", "int8_convrot", "plain"])
@pytest.mark.parametrize("quantises", [False, True])
def test_a_decision_of_stock_is_said_in_the_marker(format, quantises, state):
    made = packed_checkpoints.pack(state, format, torch.bfloat16)
    lendable = lendable_tensors(
        made.tensors, find_packed(made.tensors, "x"), lambda packed: quantises and len(packed.shape) == 2
    )
    assert described(lendable)[f"{NAME}.weight"].quantises_input is quantises
    assert described(lendable) == lendable.packed
    if format == "plain" and not quantises:
        assert not lendable.markers
    else:
        config = json.loads(bytes(lendable.markers[f"{NAME}.comfy_quant"].tolist()))
        assert config.get("full_precision_matrix_mult", False) is not quantises


def test_scales_have_room_for_those_of_patched_weights():
    weight = torch.ones(3, 4, dtype=torch.int8)
    for scale, shape in (
        (torch.tensor(0.5, dtype=torch.bfloat16), ()),
        (torch.tensor([0.5], dtype=torch.bfloat16), (3, 1)),
        (torch.full((3,), 0.5), (3, 1)),
        (torch.full((3, 1), 0.5), (3, 1)),
    ):
        marker = torch.tensor([*b'{"format": "int8_tensorwise"}'], dtype=torch.uint8)
        tensors = {"a.weight": weight, "a.weight_scale": scale, "a.comfy_quant": marker}
        lendable = lendable_tensors(tensors, find_packed(tensors, "x"), as_the_file)
        found = lendable.tensors["a.weight_scale"]
        assert (found.dtype, tuple(found.shape), set(found.flatten().tolist())) == (torch.float32, shape, {0.5})
        assert lendable.group("a.weight") == ("a.weight", "a.weight_scale")
        assert described(lendable) == lendable.packed


def test_tensors_of_another_gguf_loader_are_refused():
    class GGMLTensor(torch.Tensor):
        pass

    with pytest.raises(Unsupported, match=r"^x: blk is a GGUF tensor .*XDiT UNet Loader"):
        find_packed({"blk": torch.zeros(2).as_subclass(GGMLTensor)}, "x")
