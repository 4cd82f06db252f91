"""Changes that a user makes to a lent model: those that workers follow, and those that they cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import accelerate.hooks
import torch
from class_entries import ENTRIES
from class_entry import Random
from customized_pipelines import HalvedAttention
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformerBlock
from flux_pipelines import (
    build_ip_adapter,
    build_lora,
    flux,
    flux_call,
    ip_adapter_weights,
    lora_weights,
    run_image_to_image,
    run_ip_adapter,
    run_lora,
    run_plain,
)

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Followed:
    """``changes`` are made one after the other, and the pipeline runs after each. ``has_effect``: results differ."""

    name: str
    changes: tuple[Change, ...]
    build: Callable[[], Any] = flux
    run: Callable[[Any], list[torch.Tensor]] = run_plain
    has_effect: bool = True
    components: tuple[str, ...] = ("transformer",)


def block_of(pipe: Any) -> Any:
    return pipe.transformer.transformer_blocks[0]


def hook_module(pipe: Any) -> None:
    """Two hooks, whose order matters, and a pre-hook; all run in this process."""
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 0.5}), with_kwargs=True
    )
    pipe.transformer.register_forward_hook(lambda _, args, result: (result[0] + 1.0,))
    pipe.transformer.register_forward_hook(lambda _, args, result: (result[0] * 2.0,))


def change_config(pipe: Any) -> None:
    pipe.transformer.register_to_config(axes_dims_rope=(8, 4, 4))


def in_tiles(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size = 8
    pipe.vae.tile_latent_min_size = 4


@torch.no_grad()
def write_parameter(pipe: Any) -> None:
    block_of(pipe).ff.net[2].weight.mul_(3.0)


def write_data(pipe: Any) -> None:
    block_of(pipe).ff.net[2].weight.data.mul_(3.0)


def assign_data(pipe: Any) -> None:
    weight = block_of(pipe).ff.net[2].weight
    weight.data = weight.data * 3.0


def free_and_assign_data(pipe: Any) -> None:
    """The new memory usually gets the address of the old one."""
    weight = block_of(pipe).ff.net[2].weight
    shape = weight.shape
    first = weight.data.flatten()[:4].clone()
    weight.data = torch.empty(0)
    new = torch.full(shape, 0.05)
    new.view(-1)[:4] = first
    weight.data = new


def replace_parameter(pipe: Any) -> None:
    layer = block_of(pipe).ff.net[2]
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 3.0, requires_grad=False)


def in_half(pipe: Any) -> None:
    pipe.to(torch.bfloat16)


def to_float(pipe: Any) -> None:
    pipe.to(torch.float32)


def run_in_dtype(pipe: Any) -> list[torch.Tensor]:
    call = flux_call(output_type="latent")  # the VAE keeps its dtype
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        call[name] = call[name].to(pipe.transformer.dtype)
    return [pipe(**call).images]


def replace_by_identity(pipe: Any) -> None:
    block_of(pipe).norm2 = torch.nn.Identity()


def swap_blocks(pipe: Any) -> None:
    blocks = pipe.transformer.transformer_blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]


def share_blocks(pipe: Any) -> None:
    blocks = pipe.transformer.transformer_blocks
    blocks[1] = blocks[0]


def remove_block(pipe: Any) -> None:
    del pipe.transformer.transformer_blocks[1]


def change_axes(pipe: Any) -> None:
    pipe.transformer.pos_embed.axes_dim = [8, 4, 4]


def change_deep_list(pipe: Any) -> None:
    pipe.transformer.pos_embed.axes_dim[1:] = [2, 6]


def enable_and_disable_cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=2.0))
    pipe.transformer.disable_cache()


def load_ip_adapter(pipe: Any) -> None:
    pipe.load_ip_adapter(
        ip_adapter_weights(),
        weight_name=None,
        image_encoder_pretrained_model_name_or_path=None,
        low_cpu_mem_usage=False,
    )


def run_with_or_without_adapter(pipe: Any) -> list[torch.Tensor]:
    return run_plain(pipe) if getattr(pipe.transformer, "encoder_hid_proj", None) is None else run_ip_adapter(pipe)


def add_lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora_weights(seed=31, rank=2), adapter_name="style")


def add_second_lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora_weights(seed=32, rank=4), adapter_name="subject")


def build_fused_and_loaded() -> Any:
    pipe = build_lora()
    pipe.fuse_lora(lora_scale=0.7)
    return pipe


def skyreels() -> Any:
    entry = ENTRIES["SkyReelsV2Transformer3DModel"]

    class Holder:
        transformer = entry.build()

        def run(self) -> list[torch.Tensor]:
            with torch.no_grad():
                return [self.transformer(**entry.arguments(Random(1)), return_dict=False)[0]]

    return Holder()


FOLLOWED = (
    Followed("hooks on the module", (hook_module,)),
    Followed("processor of diffusers", (lambda pipe: pipe.transformer.set_attn_processor(FluxAttnProcessor()),),
             has_effect=False),
    Followed("fused projections", (lambda pipe: pipe.transformer.fuse_qkv_projections(),
                                   lambda pipe: pipe.transformer.unfuse_qkv_projections()), has_effect=False),
    Followed("parameter written", (write_parameter, write_parameter)),
    Followed("written through data", (write_data, write_data)),
    Followed("data assigned", (assign_data,)),
    Followed("data freed and assigned", (free_and_assign_data,)),
    Followed("parameter replaced", (replace_parameter, replace_parameter)),
    Followed("cast", (in_half, to_float), run=run_in_dtype),
    Followed("module cast", (lambda pipe: pipe.transformer.to(torch.bfloat16),), run=run_in_dtype),
    Followed("submodule replaced by Identity", (replace_by_identity,)),
    Followed("submodules swapped", (swap_blocks,)),
    Followed("submodule shared", (share_blocks,)),
    Followed("submodule removed", (remove_block,)),
    Followed("attribute", (lambda pipe: setattr(block_of(pipe).norm1.norm, "eps", 0.5),)),
    Followed("element of a list", (change_axes, change_deep_list)),
    Followed("configuration", (change_config,), has_effect=False),
    Followed("cache enabled and disabled", (enable_and_disable_cache,), has_effect=False),
    Followed("IP adapter loaded and unloaded", (load_ip_adapter, lambda pipe: pipe.unload_ip_adapter()),
             run=run_with_or_without_adapter),
    Followed("IP adapter scale", (lambda pipe: pipe.set_ip_adapter_scale(0.1),), build=build_ip_adapter,
             run=run_ip_adapter),
    Followed("LoRA loaded, scaled, and unloaded", (
        add_lora,
        add_second_lora,
        lambda pipe: pipe.set_adapters(["style", "subject"], adapter_weights=[0.3, 0.9]),
        lambda pipe: pipe.delete_adapters(["style"]),
        lambda pipe: pipe.unload_lora_weights(),
    )),
    Followed("LoRA fused and unfused", (
        lambda pipe: pipe.fuse_lora(adapter_names=["style"], lora_scale=0.5),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.fuse_lora(lora_scale=0.7),
    ), build=build_lora),
    Followed("LoRA unloaded that was fused", (lambda pipe: pipe.unload_lora_weights(),), build=build_fused_and_loaded,
             has_effect=False),
    Followed("LoRA with a scale in the call", (lambda pipe: pipe.set_adapters(["subject"]),), build=build_lora,
             run=run_lora),
    Followed("attention backend", (lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
                                   lambda pipe: pipe.transformer.reset_attention_backend()), has_effect=False),
    Followed("training mode", (lambda pipe: pipe.transformer.train(), lambda pipe: pipe.transformer.eval()),
             has_effect=False),
    Followed("gradient checkpointing", (lambda pipe: pipe.transformer.enable_gradient_checkpointing(),),
             has_effect=False),
    Followed("tiles", (in_tiles, lambda pipe: pipe.vae.disable_tiling()),
             build=lambda: flux("FluxImg2ImgPipeline"), run=run_image_to_image, components=("transformer", "vae")),
    Followed("blocks of a video", (lambda holder: holder.transformer._set_ar_attention(1),
                                   lambda holder: holder.transformer._set_ar_attention(0)),
             build=skyreels, run=lambda holder: holder.run(), has_effect=False),
)  # fmt: skip


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
    Refused("submodule of an own class", own_submodule, "OwnBlock"),
    Refused("class of a submodule", swap_class, "OwnTransformerBlock"),
    Refused("lambda in an attribute", unforeseen, "unforeseen of transformer_blocks.0.ff is a function"),
    Refused("method of an instance", own_bound_method, "forward of transformer_blocks.0 is a partial"),
    Refused("method of a class", patched_class, "FluxTransformerBlock.forward was replaced by .*patched_class"),
    Refused("function of a module", patched_function, "_get_qkv_projections was replaced by .*patched_function"),
    Refused("attention of torch", patched_attention, "scaled_dot_product_attention was replaced"),
    Refused("offloading of submodules", offload_submodules, "_hf_hook"),
    Refused("offloading of the module", offload_module, "_hf_hook"),
    Refused("group offloading", group_offload, "hooks of diffusers, group_offloading"),
    Refused("dropout", train_with_dropout, "draws random numbers"),
    Refused("mode of torch", function_mode, "DeviceContext is active"),
)  # fmt: skip
