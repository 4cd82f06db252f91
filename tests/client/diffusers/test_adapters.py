"""Which LoRA layers of PEFT are branches, and what is left of a module without them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from flux_pipelines import build_lora, flux
from peft import LoraConfig
from peft.tuners.lora import Linear

from xditd.client.base_layers import with_base_layers
from xditd.client.diffusers.adapters import NO_ADAPTERS, find_adapters
from xditd.client.diffusers.call_scale import scale_of
from xditd.client.diffusers.changes import Snapshot
from xditd.ipc import module_state
from xditd.ipc.facts import METHODS
from xditd.ipc.transports.module_walk import walk_module


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def layer_of(pipe: Any) -> Any:
    return pipe.transformer.transformer_blocks[0].attn.to_q


def test_without_adapters_it_is_described_as_if_it_had_never_had_any() -> None:
    plain, tensors = walk_module(flux().transformer, METHODS)
    module = build_lora().transformer
    adapters = find_adapters(module)
    found, kept = with_base_layers(*walk_module(module, METHODS), adapters.layers)
    assert module_state.encode(found, "x") == module_state.encode(plain, "x")
    assert list(kept) == list(tensors)
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)
    assert len(adapters.layers) == 12


def test_scales_are_those_of_the_active_adapters() -> None:
    pipe = build_lora()
    adapters = find_adapters(pipe.transformer)
    path = "transformer_blocks.0.attn.to_q"
    scales = adapters.scales()
    assert scales is not None
    assert {name: each[path] for name, each in scales.items()} == {"style": 0.8, "subject": 0.5}
    assert adapters.first_scales("style")[path] == 1.0
    pipe.set_adapters(["subject"], [0.25])
    assert {name: each[path] for name, each in (adapters.scales() or {}).items()} == {"subject": 0.25}
    pipe.disable_lora()
    assert adapters.scales() == {}
    pipe.enable_lora()
    pipe.fuse_lora()
    assert adapters.scales() is None


def test_an_adapter_that_came_later_is_noticed() -> None:
    pipe = build_lora()
    adapters = find_adapters(pipe.transformer)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="new")
    assert adapters.scales() is None


def hook(pipe: Any) -> None:
    layer_of(pipe).lora_A["style"].register_forward_hook(lambda module, arguments, result: result * 2.0)


def replace_forward(pipe: Any) -> None:
    layer_of(pipe).lora_B["style"].forward = lambda x: x


def dropout(pipe: Any) -> None:
    layer_of(pipe).lora_dropout["style"] = torch.nn.Dropout(0.5)


def in_other_dtypes(pipe: Any) -> None:
    layer_of(pipe).lora_A["style"].to(torch.bfloat16)


def share(pipe: Any) -> None:
    blocks = pipe.transformer.transformer_blocks
    blocks[1].attn.to_q = blocks[0].attn.to_q


NO_BRANCH: dict[str, Callable[[Any], Any]] = {
    "hook": hook,
    "forward": replace_forward,
    "dropout": dropout,
    "dtypes": in_other_dtypes,
    "shared": share,
    "tensor as scale": lambda pipe: layer_of(pipe).scaling.update(style=torch.tensor(0.5)),
    "infinite scale": lambda pipe: layer_of(pipe).scaling.update(style=float("inf")),
    "no cast of the input": lambda pipe: setattr(layer_of(pipe), "cast_input_dtype_enabled", False),
    "unknown attribute": lambda pipe: setattr(layer_of(pipe), "later_version", 1),
    "another base": lambda pipe: setattr(layer_of(pipe), "base_layer", torch.nn.Identity()),
    "alike name": lambda pipe: pipe.transformer.add_module("transformer_blocks_0_attn_to_q", torch.nn.Identity()),
    "fused": lambda pipe: pipe.fuse_lora(),
    "DoRA": lambda pipe: pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q"], use_dora=True), adapter_name="new"
    ),
    "bias": lambda pipe: pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q"], lora_bias=True), adapter_name="new"
    ),
}


@pytest.mark.parametrize("change", NO_BRANCH.values(), ids=NO_BRANCH)
def test_what_computes_something_else_is_no_branch(change: Callable[[Any], Any]) -> None:
    pipe = build_lora()
    assert find_adapters(pipe.transformer).layers
    change(pipe)
    assert find_adapters(pipe.transformer) is NO_ADAPTERS


def test_an_adapter_that_was_fused_before_it_was_unloaded_has_changed_the_base() -> None:
    pipe = build_lora()
    before = Snapshot(pipe.transformer, METHODS, has_branches=True)
    pipe.unload_lora_weights()
    assert Snapshot(pipe.transformer, METHODS, has_branches=True).has_same_base(before)
    pipe = build_lora()
    before = Snapshot(pipe.transformer, METHODS, has_branches=True)
    before._contents = {}  # as on a GPU, where the bytes of weights are not compared
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = Snapshot(pipe.transformer, METHODS, has_branches=True)
    after._contents = {}
    assert not after.has_same_base(before)


def test_the_scale_of_a_call_is_known_where_diffusers_applies_it() -> None:
    known = {"joint_attention_kwargs": {"scale": 0.5}}
    assert scale_of(FluxTransformer2DModel, "forward", known) == 0.5
    assert scale_of(FluxTransformer2DModel, "forward", {"joint_attention_kwargs": {"ip": 1}, "x": None}) == 1.0
    assert scale_of(FluxTransformer2DModel, "forward", {"cross_attention_kwargs": {"scale": 0.5}}) is None
    assert scale_of(FluxTransformer2DModel, "forward", {"joint_attention_kwargs": {"scale": "0.5"}}) is None
    assert scale_of(torch.nn.Linear, "forward", known) is None


def test_reading_the_scales_of_a_large_model_is_fast() -> None:
    """FLUX.1 with an adapter of 494 layers. The bound leaves room for a busy machine."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "ff.net.2", "add_q_proj"]
        model.add_adapter(LoraConfig(r=16, target_modules=targets), adapter_name="style")
    adapters = find_adapters(model)
    assert adapters is NO_ADAPTERS  # on meta
    layers = {path: each for path, each in model.named_modules() if isinstance(each, Linear)}
    adapters = type(adapters)(layers, {"style": dict.fromkeys(layers)})  # type: ignore[arg-type]
    times = []
    for _ in range(20):
        began = time.perf_counter()
        scales = adapters.scales()
        times.append(time.perf_counter() - began)
    assert scales is not None
    assert len(scales["style"]) == len(layers) > 300
    assert min(times) < 0.010
