"""Changes that a user makes to a lent model, and that workers cannot follow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import accelerate.hooks
import torch
from customized_pipelines import HalvedAttention
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from followed_changes import block_of


@dataclass(frozen=True)
class Refused:
    """``change`` returns how to undo it, or ``None`` where no undoing exists."""

    name: str
    change: Callable[[Any], Callable[[], object] | None]
    text: str


class OwnBlock(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2.0


class OwnTransformerBlock(FluxTransformerBlock):
    """A class of the test's."""


class OwnTensor(torch.Tensor):
    """As those of quantised weights."""


def own_submodule(pipe: Any) -> Callable[[], None]:
    block = block_of(pipe)
    before, block.norm2 = block.norm2, OwnBlock()
    return lambda: setattr(block, "norm2", before)


def unforeseen(pipe: Any) -> Callable[[], None]:
    """A change that nobody thought of."""
    layer = block_of(pipe).ff
    layer.unforeseen = lambda states: states * 2.0
    return lambda: delattr(layer, "unforeseen")


def hook_block(pipe: Any) -> Callable[[], None]:
    return block_of(pipe).register_forward_hook(lambda _, args, results: (results[0], results[1] * 0.5)).remove


def pre_hook_block(pipe: Any) -> Callable[[], None]:
    return block_of(pipe).register_forward_pre_hook(lambda _, args: args).remove


def global_hook(pipe: Any) -> Callable[[], None]:
    return torch.nn.modules.module.register_module_forward_hook(lambda _, args, results: results).remove


def own_processor(pipe: Any) -> Callable[[], None]:
    before = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(HalvedAttention())
    return lambda: pipe.transformer.set_attn_processor(before)


def enable_cache(pipe: Any) -> Callable[[], None]:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=2.0))
    return pipe.transformer.disable_cache


def compile_block(pipe: Any) -> Callable[[], None]:
    block_of(pipe).compile(backend="eager")
    return lambda: delattr(block_of(pipe), "_compiled_call_impl")


def own_tensor(pipe: Any) -> Callable[[], None]:
    layer = block_of(pipe).ff.net[2]
    before = layer.weight
    layer._parameters["weight"] = before.detach().as_subclass(OwnTensor)
    return lambda: layer._parameters.update(weight=before)


def sparse_tensor(pipe: Any) -> Callable[[], None]:
    layer = block_of(pipe).ff.net[2]
    before = layer.weight
    layer.weight = torch.nn.Parameter(before.detach().to_sparse(), requires_grad=False)
    return lambda: setattr(layer, "weight", before)


def swap_class(pipe: Any) -> Callable[[], None]:
    block_of(pipe).__class__ = OwnTransformerBlock
    return lambda: setattr(block_of(pipe), "__class__", FluxTransformerBlock)


def own_bound_method(pipe: Any) -> Callable[[], None]:
    block = block_of(pipe)
    block.forward = functools.partial(type(block).forward, block)
    return lambda: delattr(block, "forward")


def patched_class(pipe: Any) -> Callable[[], None]:
    before = FluxTransformerBlock.forward
    FluxTransformerBlock.forward = lambda self, *args, **kwargs: before(self, *args, **kwargs)
    return lambda: setattr(FluxTransformerBlock, "forward", before)


def patched_function(pipe: Any) -> Callable[[], None]:
    before = transformer_flux._get_qkv_projections
    transformer_flux._get_qkv_projections = lambda *args: before(*args)
    return lambda: setattr(transformer_flux, "_get_qkv_projections", before)


def patched_by_object(pipe: Any) -> Callable[[], None]:
    before = transformer_flux.apply_rotary_emb
    transformer_flux.apply_rotary_emb = functools.partial(before, sequence_dim=2)
    return lambda: setattr(transformer_flux, "apply_rotary_emb", before)


def patched_torch(pipe: Any) -> Callable[[], None]:
    before = torch.cat
    torch.cat = lambda *args, **kwargs: before(*args, **kwargs)
    return lambda: setattr(torch, "cat", before)


def patched_attention(pipe: Any) -> Callable[[], None]:
    before = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda *args, **kwargs: before(*args, **kwargs)
    return lambda: setattr(torch.nn.functional, "scaled_dot_product_attention", before)


def offload_submodules(pipe: Any) -> Callable[[], None]:
    accelerate.hooks.attach_align_device_hook(pipe.transformer, execution_device="cpu")
    return lambda: accelerate.hooks.remove_hook_from_submodules(pipe.transformer)


def offload_module(pipe: Any) -> Callable[[], None]:
    _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    return hook.remove


def group_offload(pipe: Any) -> Callable[[], None]:
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level", use_stream=False
    )

    def undo() -> None:
        for each in pipe.transformer.modules():
            registry = HookRegistry.check_if_exists_or_initialize(each)
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)

    return undo


def train_with_dropout(pipe: Any) -> Callable[[], None]:
    dropout = next(each for each in pipe.transformer.modules() if isinstance(each, torch.nn.Dropout))
    dropout.p = 0.5
    pipe.transformer.train()

    def undo() -> None:
        dropout.p = 0.0
        pipe.transformer.eval()

    return undo


def function_mode(pipe: Any) -> Callable[[], None]:
    torch.set_default_device("cpu")
    return lambda: torch.set_default_device(None)


REFUSED = (
    Refused("hook on a submodule", hook_block, "_forward_hooks of transformer_blocks.0 is function"),
    Refused("pre-hook on a submodule", pre_hook_block, "_forward_pre_hooks of transformer_blocks.0 is function"),
    Refused("global hook", global_hook, "global forward hooks"),
    Refused("own processor", own_processor, "processor of .* is a customized_pipelines:HalvedAttention object"),
    Refused("step cache", enable_cache, "hooks of diffusers, fbc_"),
    Refused("compiled submodule", compile_block, "_compiled_call_impl of transformer_blocks.0"),
    Refused("tensor of a subclass", own_tensor, r"transformer_blocks.0.ff.net.2.weight is a .*OwnTensor"),
    Refused("sparse tensor", sparse_tensor, r"transformer_blocks.0.ff.net.2.weight has the layout torch.sparse_coo"),
    Refused("submodule of an own class", own_submodule, "OwnBlock"),
    Refused("class of a submodule", swap_class, "OwnTransformerBlock"),
    Refused("lambda in an attribute", unforeseen, "unforeseen of transformer_blocks.0.ff is a function"),
    Refused("method of an instance", own_bound_method, "forward of transformer_blocks.0 is a partial"),
    Refused("method of a class", patched_class, "FluxTransformerBlock.forward was replaced by .*patched_class"),
    Refused("function of a module", patched_function, "_get_qkv_projections was replaced by .*patched_function"),
    Refused("function replaced by an object", patched_by_object, "apply_rotary_emb was replaced by functools.partial"),
    Refused("function of torch", patched_torch, "torch.cat was replaced by .*patched_torch"),
    Refused("attention of torch", patched_attention, "scaled_dot_product_attention was replaced"),
    Refused("offloading of submodules", offload_submodules, "_hf_hook"),
    Refused("offloading of the module", offload_module, "_hf_hook"),
    Refused("group offloading", group_offload, "hooks of diffusers, group_offloading"),
    Refused("dropout", train_with_dropout, "draws random numbers"),
    Refused("mode of torch", function_mode, "DeviceContext is active"),
)  # fmt: skip
