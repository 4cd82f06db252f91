"""Changes that a user makes to a lent model, and that workers follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from class_entries import ENTRIES
from class_entry import Random
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
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


def negate_data(pipe: Any) -> None:
    """The memory stays as it is."""
    weight = block_of(pipe).ff.net[2].weight
    weight.data = torch._neg_view(weight.data)


def build_transposed() -> Any:
    """A weight whose rows lie next to each other in memory."""
    pipe = flux()
    weight = block_of(pipe).ff.net[2].weight
    weight.data = weight.data.T.contiguous().T
    return pipe


def channels_last(pipe: Any) -> None:
    pipe.vae.to(memory_format=torch.channels_last)


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
    Followed("written through data in another order", (write_data, write_data), build=build_transposed),
    Followed("channels last", (channels_last,), has_effect=False, components=("vae",)),
    Followed("data assigned", (assign_data,)),
    Followed("data negated", (negate_data, negate_data)),
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
