"""Tiny pipelines whose user changed a component, or does more in a call than most do."""

from __future__ import annotations

from typing import Any

import torch
from class_entry import Random
from diffusers import (
    FirstBlockCacheConfig,
    FluxControlNetModel,
    LayerSkipConfig,
    SkipLayerGuidance,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    WanPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from flux_pipelines import CONFIG, flux, flux_call, run_plain
from modular_pipelines import modular_pipeline
from pipeline_entry import PipelineEntry
from pipeline_parts import TRANSFORMER_AND_VAE, embeddings, generator, image, seeded, tensors
from qwen_and_sd3_pipelines import sd3_call, sd3_parts
from stable_diffusion_pipelines import TEXT_SIZE, run_stable_diffusion, stable_diffusion_call, stable_diffusion_parts
from wan_pipelines import run_wan, wan_call, wan_parts

UNET_COMPONENTS = ("text_encoder", "unet", "vae")


# ---- A changed model ----


class HalvedAttention(FluxAttnProcessor):
    """An attention processor of the user's own: it halves what the attention adds to the image."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        results = super().__call__(attn, hidden_states, *args, **kwargs)
        if isinstance(results, tuple):
            return (results[0] * 0.5, *results[1:])
        return results * 0.5


def build_own_attention() -> Any:
    pipe = flux()
    pipe.transformer.set_attn_processor(HalvedAttention())
    return pipe


def build_fused_projections() -> Any:
    pipe = flux()
    pipe.transformer.fuse_qkv_projections()
    return pipe


def build_forward_hook() -> Any:
    """Return a pipeline with a hook of the user's own on one block."""
    pipe = flux()
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_hook(lambda module, args, results: (results[0], results[1] * 0.5))
    return pipe


def build_first_block_cache() -> Any:
    """Return a pipeline that skips the blocks after the first one if that changes its input little."""
    pipe = flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=2.0))
    return pipe


def run_first_block_cache(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**flux_call(num_inference_steps=4)).images)


def build_skip_layer_guidance() -> Any:
    """Return a modular pipeline whose guider skips a block of the transformer, by hooks, in a third call."""
    parts = {name: part for name, part in wan_parts().items() if part is not None}
    skipped = LayerSkipConfig(indices=[1], fqn="blocks")
    guider = SkipLayerGuidance(
        guidance_scale=3.0,
        skip_layer_config=skipped,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    )
    return modular_pipeline("WanBlocks", guider=guider, **parts)


def run_skip_layer_guidance(pipe: Any) -> list[torch.Tensor]:
    arguments = wan_call()
    del arguments["guidance_scale"]  # the guider has it
    return tensors(pipe(**arguments).get("videos"))


CHANGED_MODELS = (
    PipelineEntry("flux-own-attention", "changed-model", build_own_attention, run_plain, TRANSFORMER_AND_VAE),
    PipelineEntry("flux-fused-projections", "changed-model", build_fused_projections, run_plain, TRANSFORMER_AND_VAE),
    PipelineEntry("flux-forward-hook", "changed-model", build_forward_hook, run_plain, TRANSFORMER_AND_VAE),
    PipelineEntry(
        "flux-first-block-cache", "step-cache", build_first_block_cache, run_first_block_cache, TRANSFORMER_AND_VAE
    ),
    PipelineEntry(
        "modular-wan-skip-layer-guidance",
        "modular",
        build_skip_layer_guidance,
        run_skip_layer_guidance,
        TRANSFORMER_AND_VAE,
    ),
)


# ---- More adapters and ControlNets ----


def build_two_controlnets() -> Any:
    """Return a pipeline whose component ``controlnet`` is a ``FluxMultiControlNetModel`` of two."""
    controlnets = [seeded(FluxControlNetModel(in_channels=16, num_layers=1, **CONFIG), seed) for seed in (1, 2)]
    return flux("FluxControlNetPipeline", controlnet=controlnets)


def run_two_controlnets(pipe: Any) -> list[torch.Tensor]:
    images = [image(24, 16), image(24, 16, seed=8)]
    arguments = flux_call(control_image=images, controlnet_conditioning_scale=[0.6, 0.3])
    return tensors(pipe(**arguments).images)


def build_sd3_ip_adapter() -> StableDiffusion3Pipeline:
    """Return SD3 with an adapter whose projection, a part of the transformer, reads the timestep too."""
    pipe = StableDiffusion3Pipeline(**sd3_parts(), image_encoder=None, feature_extractor=None)
    projection = IPAdapterTimeImageProjection(
        embed_dim=12, output_dim=32, hidden_dim=16, heads=1, num_queries=4, timestep_in_dim=16
    )
    adapter = {}
    for block in range(len(pipe.transformer.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=32, ip_hidden_states_dim=32, head_dim=8, timesteps_emb_dim=16
        )
        weights = seeded(processor, seed=50 + block).state_dict()
        adapter.update({f"{block}.{name}": weight for name, weight in weights.items()})
    pipe.load_ip_adapter(
        {"image_proj": seeded(projection, seed=40).state_dict(), "ip_adapter": adapter},
        weight_name=None,
        image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )
    pipe.set_ip_adapter_scale(0.6)
    return pipe


def run_sd3_ip_adapter(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**sd3_call(ip_adapter_image_embeds=embeddings(2, 5, 12, seed=6))).images)


def build_unet_ip_adapter() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(**stable_diffusion_parts())
    random = Random(34)
    processors = pipe.unet.attn_processors
    cross_attentions = [number for number, name in enumerate(processors) if "attn2" in name]
    adapter = {
        f"{number}.to_{projection}_ip.weight": random.normal(8, TEXT_SIZE) / TEXT_SIZE**0.5
        for number in cross_attentions
        for projection in ("k", "v")
    }
    projection = {
        "proj.weight": random.normal(4 * TEXT_SIZE, 12) / 12**0.5,
        "proj.bias": 0.1 * random.normal(4 * TEXT_SIZE),
        "norm.weight": 1.0 + 0.1 * random.normal(TEXT_SIZE),
        "norm.bias": 0.1 * random.normal(TEXT_SIZE),
    }
    pipe.load_ip_adapter(
        {"image_proj": projection, "ip_adapter": adapter},
        subfolder=None,
        weight_name=None,
        image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def run_unet_ip_adapter(pipe: Any) -> list[torch.Tensor]:
    arguments = stable_diffusion_call(ip_adapter_image_embeds=[embeddings(2, 1, 12, seed=6)], height=16, width=24)
    return tensors(pipe(**arguments).images)


ADAPTERS = (
    PipelineEntry(
        "flux-two-controlnets",
        "controlnet",
        build_two_controlnets,
        run_two_controlnets,
        ("transformer", "controlnet", "vae"),
    ),
    PipelineEntry("sd3-ip-adapter", "ip-adapter", build_sd3_ip_adapter, run_sd3_ip_adapter, TRANSFORMER_AND_VAE),
    PipelineEntry(
        "stable-diffusion-ip-adapter", "ip-adapter", build_unet_ip_adapter, run_unet_ip_adapter, UNET_COMPONENTS
    ),
)


# ---- More calls ----


def run_latents(pipe: Any) -> list[torch.Tensor]:
    """Start two images, of two prompts, from given latents."""
    arguments = flux_call(
        prompt_embeds=embeddings(2, 7, 32),
        pooled_prompt_embeds=embeddings(2, 32, seed=3),
        latents=embeddings(2, 24, 16),
    )
    return tensors(pipe(**arguments).images)


def run_cutoff(pipe: Any) -> list[torch.Tensor]:
    """Use guidance in the first of three steps alone: the batch that the U-Net gets shrinks."""
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    arguments = stable_diffusion_call(callback_on_step_end=callback, height=16, width=24, num_inference_steps=3)
    return tensors(pipe(**arguments).images)


class StoppedByUserError(Exception):
    """What a callback of the user's raises."""


def run_callback_error(pipe: Any) -> list[torch.Tensor]:
    """Leave a call by an error in its callback, and then call the pipeline again."""
    seen = []

    def callback(pipe: Any, step: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, Any]:
        seen.append(values["latents"].clone())
        raise StoppedByUserError

    try:
        pipe(**wan_call(callback_on_step_end=callback))
    except StoppedByUserError:
        return seen + run_wan(pipe)
    raise AssertionError("The callback's error did not reach the caller.")


def run_encode_first(pipe: Any) -> list[torch.Tensor]:
    """Encode the prompt in a call of its own, and decode the latents in another."""
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt("a red bird", "cpu", 1, True, "a blurred bird")
    latents = pipe(
        **stable_diffusion_call(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type="latent",
            height=16,
            width=24,
        )
    ).images
    sample = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    posterior = pipe.vae.encode(sample).latent_dist
    return [prompt_embeds, latents, sample, posterior.sample(generator()), posterior.mode(), posterior.std]


def build_sliced_vae() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(**stable_diffusion_parts())
    pipe.vae.enable_slicing()
    return pipe


CALLS = (
    PipelineEntry("flux-latents", "several-images", flux, run_latents, TRANSFORMER_AND_VAE),
    PipelineEntry(
        "stable-diffusion-cutoff",
        "callback",
        lambda: StableDiffusionPipeline(**stable_diffusion_parts()),
        run_cutoff,
        UNET_COMPONENTS,
    ),
    PipelineEntry(
        "wan-callback-error", "callback", lambda: WanPipeline(**wan_parts()), run_callback_error, TRANSFORMER_AND_VAE
    ),
    PipelineEntry(
        "stable-diffusion-parts",
        "text-encoder",
        lambda: StableDiffusionPipeline(**stable_diffusion_parts()),
        run_encode_first,
        UNET_COMPONENTS,
    ),
    PipelineEntry("stable-diffusion-sliced-vae", "tiled-vae", build_sliced_vae, run_stable_diffusion, UNET_COMPONENTS),
)

ENTRIES = (*CHANGED_MODELS, *ADAPTERS, *CALLS)
