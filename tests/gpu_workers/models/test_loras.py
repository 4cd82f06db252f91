"""Branches of layers, the names of layers that LoRAs use, and LoRAs bound to the models of one rank."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import lora_files
import pytest
import torch
import z_image_models
from lora_files import matrices
from packed_checkpoints import pack

from xditd.client.lending import describe
from xditd.client.loras.lending import describe_lora
from xditd.gpu_workers.kernels.branches import Branch, Branches, Strength
from xditd.gpu_workers.models.lora_binding import LentLora
from xditd.gpu_workers.models.lora_targets import Target, flat, takes_loras, targets_of
from xditd.gpu_workers.models.lora_variants import LoraCounters, prepare_variant
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import Inputs
from xditd.gpu_workers.models.registry import families
from xditd.gpu_workers.packed.linear import BranchedLinear, add_branches_to
from xditd.ipc.errors import BadRequest
from xditd.ipc.job_parts import LoraUse
from xditd.ipc.loras import LoraDescription, LoraLayer


def of_strength(value: float) -> Strength:
    strength = Strength()
    strength.value = value
    return strength


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 32), (2, 5, 32), (1, 2, 5, 32)])
def test_branches_add_to_their_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(32, 24))
    (branches,) = add_branches_to(layer).values()
    layer.to(dtype).requires_grad_(False)
    linear = layer[0]
    assert isinstance(linear, BranchedLinear)
    x = torch.randn(shape, generator=generator).to(dtype)
    plain = layer(x)
    first = Branch(torch.randn(4, 32).to(dtype), torch.randn(24, 4).to(dtype), 0.5, of_strength(0.3))
    second = Branch(torch.randn(1, 32).to(dtype), torch.randn(6, 1).to(dtype), 2.0, of_strength(-1.0), start=10)
    branches.active = (first, second, Branch(first.down, first.up, 1.0, of_strength(0.0)))
    weight = linear.weight.double() + 0.15 * first.up.double() @ first.down.double()
    weight[10:16] -= 2.0 * second.up.double() @ second.down.double()
    right = torch.nn.functional.linear(x.double(), weight, linear.bias.double())
    found = layer(x).double()
    assert float((found - right).norm() / right.norm()) <= (1e-6 if dtype == torch.float32 else 1e-2)
    branches.active = (Branch(first.down, first.up, 1.0, of_strength(0.0)),)
    assert torch.equal(layer(x), plain)


def test_rows_of_a_branch() -> None:
    branch = Branch(torch.ones(2, 3), torch.arange(12.0).view(6, 2), 1.0, Strength(), start=4)
    part = branch.rows(6, 20)
    assert part is not None
    assert (part.start, part.stop) == (0, 4)
    assert torch.equal(part.up, branch.up[2:])
    whole = branch.rows(0, 20)
    assert whole is not None
    assert (whole.start, whole.stop) == (4, 10)
    assert branch.rows(0, 4) is None
    assert branch.rows(10, 12) is None


def test_a_result_of_another_dtype_keeps_it() -> None:
    branches = Branches()
    branches.active = (Branch(torch.ones(1, 3), torch.ones(2, 1), 1.0, of_strength(1.0)),)
    found = branches.add(torch.zeros(4, 2, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), torch.full((4, 2), 3.0))


def test_no_two_layers_have_one_name() -> None:
    """With ``_`` for dots, and in the namings of checkpoints, of classes and of XLabs together."""
    for family in families():
        takes = takes_loras(family)
        if takes is None:
            continue
        known: dict[str, set[str]] = {}
        for entry in takes.lora_entries(takes.smallest):
            for name in (entry.source, *(target for target, _ in entry.targets)):
                known.setdefault(flat(name), set()).add(name)
        assert [names for names in known.values() if len(names) > 1] == [], family.name


def test_targets_of_flux1_move_with_the_key_map() -> None:
    (family,) = [each for each in families() if each.name == "flux1"]
    takes: Any = takes_loras(family)
    targets = targets_of(takes, takes.smallest)
    h = takes.smallest.hidden
    qkv = targets["double_blocks_0_img_attn_qkv"]
    assert [(part.layer, part.start, part.stop, part.at) for part in qkv.parts] == [
        ("transformer_blocks.0.attn.to_q", 0, h, 0),
        ("transformer_blocks.0.attn.to_k", h, 2 * h, 0),
        ("transformer_blocks.0.attn.to_v", 2 * h, 3 * h, 0),
    ]
    assert targets["double_blocks_0_processor_qkv_lora1"] == qkv
    in_file, of_class = targets["final_layer_adaLN_modulation_1"], targets["norm_out_linear"]
    assert [(part.start, part.at) for part in in_file.parts] == [(0, 0)]
    assert [(part.start, part.at) for part in of_class.parts] == [(0, h), (h, 0)]
    assert isinstance(of_class, Target)


@pytest.mark.parametrize("packed_format", [None, "int8_rows", "old"])
def test_one_rank_runs_the_class_of_z_image_with_them(layout, direct, packed_format: str | None) -> None:
    """Plain, and with packed layers, which multiply what has the same input together."""
    import one_rank

    plain = z_image_models.state_dict(0, names=z_image_models.COMFYUI)
    packed = None if packed_format is None else pack(plain, packed_format, torch.float32)
    source, meant = (plain, plain) if packed is None else (packed.tensors, packed.meant)
    lora = lora_files.make(matrices(plain), "comfyui", 3, size=0.2)
    offers = [describe(source, compute_dtype="float32" if packed else None), describe_lora(lora.tensors)]
    rank = one_rank.OneRank(layout)
    try:
        for name, offer in zip(("base", "lora"), offers, strict=True):
            rank.components.prepare(name, offer.manifest, rank.client)
            rank.components.plug(name)
        component = rank.components.get("base", "transformer")
        variant = rank.components.variant(component, [LoraUse(component_id="lora", strength=0.6)])
        given = z_image_models.inputs((7, 40), ((8, 12), (6, 4)))
        with variant.switched_on():
            (found,) = direct.call(component.model, [Inputs(given)])[0]
        (alone,) = direct.call(component.model, [Inputs(given)])[0]
        with torch.no_grad():
            right = z_image_models.reference(lora.baked_into(meant, 0.6))(**given, return_dict=False)[0]
            without = z_image_models.reference(meant)(**given, return_dict=False)[0]
        for row in range(2):
            assert z_image_models.relative_error(found[row], right[row]) <= 2e-6
            assert z_image_models.relative_error(alone[row], without[row]) <= 2e-6
            assert z_image_models.relative_error(alone[row], right[row]) > 0.05
        del variant
        rank.components.unmap("lora")  # nothing refers to its memory, else this fails
        assert len(rank.components) == 1
    finally:
        rank.close()
        for offer in offers:
            offer.close()


@pytest.fixture
def lent(demo_transformer: dict[str, torch.Tensor]) -> LentLora:
    lora = lora_files.make(matrices(demo_transformer), "kohya", 1)
    offer = describe_lora(lora.tensors)
    assert offer.manifest.lora is not None
    found = LentLora("x", offer.manifest.lora)
    found.plug(dict(lora.tensors), "lora-1")
    offer.close()
    return found


def test_a_switch_writes_references_alone(shared_cache, plug, demo_transformer, lent: LentLora, capsys) -> None:
    match = plug(shared_cache, demo_transformer)
    model, counters = match.model, LoraCounters()
    addresses = [each.data_ptr() for each in model.module.parameters()]
    before = [each.clone() for each in model.module.parameters()]
    uses = (LoraUse(component_id="lora-1", strength=0.5),)
    variant = prepare_variant(model, uses, lambda _: lent, counters)
    with variant.switched_on():
        assert all(branches.active for branches in model.branches.values())
    assert not any(branches.active for branches in model.branches.values())
    began_s = time.perf_counter()
    for _ in range(100):
        with prepare_variant(model, uses, lambda _: lent, counters).switched_on():
            pass
    assert (time.perf_counter() - began_s) / 100 < 0.05  # a hundred times what it takes
    assert (counters.jobs, counters.switches, counters.bound, counters.converted_bytes) == (101, 101, 1, 0)
    assert [each.data_ptr() for each in model.module.parameters()] == addresses
    assert all(torch.equal(*pair) for pair in zip(before, model.module.parameters(), strict=True))
    with pytest.raises(KeyError), variant.switched_on():
        raise KeyError
    assert not any(branches.active for branches in model.branches.values())
    zero = prepare_variant(model, (LoraUse(component_id="lora-1", strength=0.0),), lambda _: lent, counters)
    assert not zero.changes
    with zero.switched_on():
        assert not any(branches.active for branches in model.branches.values())


def test_factors_are_converted_once_and_freed(cache, plug, demo_transformer, lent: LentLora) -> None:
    half = {name: tensor.bfloat16() for name, tensor in demo_transformer.items()}
    model = plug(cache, half).model
    counters = LoraCounters()
    uses = (LoraUse(component_id="lora-1", strength=0.5),)
    for _ in range(3):
        prepare_variant(model, uses, lambda _: lent, counters)
    factors = sum(tensor.numel() for name, tensor in lent._factors.items() if ".lora_" in name)
    assert counters.converted_bytes == lent.converted_bytes == 2 * factors
    lent.unplug()
    assert lent.converted_bytes == 0
    assert not lent.is_bound_to(model)


def test_a_lora_keeps_no_model(layout, plug, demo_transformer, lent: LentLora) -> None:
    """Caches drop models that are lent no more; a LoRA may be lent longer."""
    model = plug(ModelCache(layout), demo_transformer).model
    lent.bind(model)
    assert lent.is_bound_to(model)
    model.unplug()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_rows_of_a_fused_layer_are_those_of_its_parts(shared_cache, plug, demo_transformer) -> None:
    """Factors of some rows of a checkpoint's layer, across the bounds of the module's layers."""
    model = plug(shared_cache, demo_transformer).model
    hidden = demo_transformer["double_blocks.0.img_attn.qkv.weight"].shape[1]
    up, down = torch.randn(hidden, 2), torch.randn(2, hidden)

    def bound(start: int) -> dict[str, Any]:
        layer = LoraLayer("double_blocks_0_img_attn_qkv", "model", "down", "up", 1.0, start)
        lora = LentLora("x", LoraDescription(layers=(layer,)))
        lora.plug({"down": down, "up": up}, "lora-1")
        by_id = {id(branches): name for name, branches in model.branches.items()}
        return {by_id[id(branches)]: each for branches, (each,) in lora.bind(model).slots if id(branches) in by_id}

    (keys,) = bound(hidden).items()
    assert keys[0].endswith("attn.to_k")
    assert (keys[1].start, keys[1].stop) == (0, hidden)
    half = hidden // 2
    parts = {name.rpartition(".")[2]: each for name, each in bound(half).items()}
    assert parts.keys() == {"to_q", "to_k"}
    assert (parts["to_q"].start, parts["to_q"].stop) == (half, hidden)
    assert torch.equal(parts["to_q"].up, up[:half])
    assert (parts["to_k"].start, parts["to_k"].stop) == (0, half)
    assert torch.equal(parts["to_k"].up, up[half:])
    with pytest.raises(BadRequest, match=f"outputs from {2 * hidden + 1} on"):
        bound(2 * hidden + 1)
