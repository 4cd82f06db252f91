"""Tiny pipelines of FLUX.1: the plain one with what all pipelines offer, its relatives, and its adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import torch
from class_entry import Random
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from pipeline_entry import Feature, PipelineEntry
from pipeline_parts import (
    PROMPT,
    TRANSFORMER_AND_VAE,
    clip_text_encoder,
    embeddings,
    flux_vae,
    generator,
    image,
    mask,
    seeded,
    t5_text_encoder,
    tensors,
    tokenizer,
)

HIDDEN_SIZE = 32
CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
WITHOUT_TEXT_ENCODERS = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def flux_transformer() -> FluxTransformer2DModel:
    return seeded(FluxTransformer2DModel(in_channels=16, num_layers=2, **CONFIG))


def flux(pipeline_class: str = "FluxPipeline", **components: Any) -> Any:
    """Return a pipeline of FLUX.1, without text encoders unless ``components`` has them."""
    return getattr(diffusers, pipeline_class)(
        **{
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            "transformer": flux_transformer(),
            "vae": flux_vae(latent_channels=4),
            **WITHOUT_TEXT_ENCODERS,
            **components,
        }
    )


def flux_call(**arguments: Any) -> dict[str, Any]:
    """Return the arguments of a call of FLUX.1, with prompt embeddings, for an image of 16 by 24 pixels."""
    return {
        "prompt_embeds": embeddings(1, 7, 32),
        "pooled_prompt_embeds": embeddings(1, 32, seed=3),
        "height": 16,
        "width": 24,
        "num_inference_steps": 2,
        "guidance_scale": 3.5,
        "generator": generator(),
        "output_type": "pt",
        **arguments,
    }


def negative() -> dict[str, Any]:
    """Return the arguments of true classifier-free guidance, which runs the transformer twice a step."""
    return {
        "negative_prompt_embeds": embeddings(1, 7, 32, seed=4),
        "negative_pooled_prompt_embeds": embeddings(1, 32, seed=5),
        "true_cfg_scale": 2.0,
    }


def run_plain(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**flux_call()).images)


# ---- Relatives of the plain pipeline ----


def run_true_cfg(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**flux_call(), **negative()).images)


def build_with_text_encoders() -> Any:
    return flux(
        text_encoder=clip_text_encoder(32),
        text_encoder_2=t5_text_encoder(32),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
    )


def run_prompt(pipe: Any) -> list[torch.Tensor]:
    prompts = {"prompt": [PROMPT, "a lake"], "prompt_embeds": None, "pooled_prompt_embeds": None}
    return tensors(pipe(**flux_call(**prompts, max_sequence_length=8)).images)


def run_image_to_image(pipe: Any) -> list[torch.Tensor]:
    arguments = flux_call(image=image(24, 16), strength=0.7, num_inference_steps=3)
    return tensors(pipe(**arguments).images)


def run_inpaint(pipe: Any) -> list[torch.Tensor]:
    arguments = flux_call(image=image(24, 16), mask_image=mask(24, 16), strength=0.7, num_inference_steps=3)
    return tensors(pipe(**arguments).images)


def run_kontext(pipe: Any) -> list[torch.Tensor]:
    arguments = flux_call(image=image(20, 20), max_area=16 * 24, _auto_resize=False)
    return tensors(pipe(**arguments).images)


def build_controlnet() -> Any:
    controlnet = seeded(FluxControlNetModel(in_channels=16, num_layers=1, num_mode=3, **CONFIG), seed=1)
    return flux("FluxControlNetPipeline", controlnet=controlnet)


def run_controlnet(pipe: Any) -> list[torch.Tensor]:
    arguments = flux_call(control_image=image(24, 16), control_mode=1, controlnet_conditioning_scale=0.6)
    return tensors(pipe(**arguments).images)


# ---- Adapters ----


def ip_adapter_weights() -> dict[str, dict[str, torch.Tensor]]:
    """Return an IP-Adapter for a transformer of four blocks, in the layout of the published ones."""
    tokens, embedding_size = 4, 12
    random = Random(30)
    adapter = {}
    for block in range(4):
        for projection in ("k", "v"):
            weight = random.normal(HIDDEN_SIZE, 32) / 32**0.5
            adapter[f"{block}.to_{projection}_ip.weight"] = weight
            adapter[f"{block}.to_{projection}_ip.bias"] = 0.1 * random.normal(HIDDEN_SIZE)
    projection = {
        "proj.weight": random.normal(tokens * 32, embedding_size) / embedding_size**0.5,
        "proj.bias": 0.1 * random.normal(tokens * 32),
        "norm.weight": 1.0 + 0.1 * random.normal(32),
        "norm.bias": 0.1 * random.normal(32),
    }
    return {"image_proj": projection, "ip_adapter": adapter}


def build_ip_adapter() -> Any:
    pipe = flux()
    pipe.load_ip_adapter(
        ip_adapter_weights(),
        weight_name=None,
        image_encoder_pretrained_model_name_or_path=None,
        low_cpu_mem_usage=False,
    )
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def run_ip_adapter(pipe: Any) -> list[torch.Tensor]:
    embeds = {
        "ip_adapter_image_embeds": [embeddings(1, 1, 12, seed=6)],
        "negative_ip_adapter_image_embeds": [embeddings(1, 1, 12, seed=7)],
    }
    return tensors(pipe(**flux_call(**embeds), **negative()).images)


def lora_weights(seed: int, rank: int) -> dict[str, torch.Tensor]:
    """Return a LoRA of every attention of FLUX.1's tiny transformer, in diffusers' layout."""
    random = Random(seed)
    weights = {}
    blocks = [f"transformer_blocks.{number}" for number in range(2)]
    blocks += [f"single_transformer_blocks.{number}" for number in range(2)]
    for block in blocks:
        for projection in ("to_q", "to_k", "to_v"):
            layer = f"transformer.{block}.attn.{projection}"
            weights[f"{layer}.lora_A.weight"] = random.normal(rank, HIDDEN_SIZE) / HIDDEN_SIZE**0.5
            weights[f"{layer}.lora_B.weight"] = random.normal(HIDDEN_SIZE, rank) / rank**0.5
    return weights


def build_lora() -> Any:
    pipe = flux()
    pipe.load_lora_weights(lora_weights(seed=31, rank=2), adapter_name="style")
    pipe.load_lora_weights(lora_weights(seed=32, rank=4), adapter_name="subject")
    pipe.set_adapters(["style", "subject"], adapter_weights=[0.8, 0.5])
    return pipe


def build_fused_lora() -> Any:
    pipe = build_lora()
    pipe.fuse_lora(adapter_names=["style"], lora_scale=0.5)
    pipe.unload_lora_weights()
    return pipe


def run_lora(pipe: Any) -> list[torch.Tensor]:
    return tensors(pipe(**flux_call(joint_attention_kwargs={"scale": 0.6})).images)


def run_changing_lora(pipe: Any) -> list[torch.Tensor]:
    """Call the pipeline with each adapter alone, without any, and with both again."""
    results = []
    for names, weights in ((["style"], [1.0]), (["subject"], [0.7])):
        pipe.set_adapters(names, adapter_weights=weights)
        results += run_plain(pipe)
    pipe.disable_lora()
    results += run_plain(pipe)
    pipe.enable_lora()
    pipe.set_adapters(["style", "subject"], adapter_weights=[0.8, 0.5])
    return results + run_plain(pipe)


# ---- What every pipeline offers ----


def run_callback(pipe: Any) -> list[torch.Tensor]:
    """Return the image, and the latents that the callback was given and changed at each step."""
    seen = []

    def callback(pipe: Any, step: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, Any]:
        seen.extend([values["latents"].clone(), timestep.clone()])
        return {"latents": values["latents"] * 0.9, "prompt_embeds": values["prompt_embeds"] * 1.1}

    inputs = ["latents", "prompt_embeds"]
    arguments = flux_call(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    return tensors(pipe(**arguments).images) + seen


def run_interrupt(pipe: Any) -> list[torch.Tensor]:
    """Stop after the first of three steps."""

    def callback(pipe: Any, step: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, Any]:
        pipe._interrupt = True
        return values

    return tensors(pipe(**flux_call(callback_on_step_end=callback, num_inference_steps=3)).images)


def run_output_types(pipe: Any) -> list[torch.Tensor]:
    results = []
    for output_type in ("latent", "pt", "np", "pil"):
        results += tensors(pipe(**flux_call(output_type=output_type)).images)
    return results + tensors(pipe(**flux_call(return_dict=False)))


def run_several_images(pipe: Any) -> list[torch.Tensor]:
    arguments = flux_call(num_images_per_prompt=2, generator=[generator(1), generator(2)])
    return tensors(pipe(**arguments).images)


def run_from_pipe(pipe: Any) -> list[torch.Tensor]:
    """Call a pipeline of another class that shares the components, and then the first one."""
    other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    return run_image_to_image(other) + run_plain(pipe)


def run_to_bfloat16(pipe: Any) -> list[torch.Tensor]:
    """Call the pipeline in bfloat16, and then in float32 again with the rounded weights."""
    pipe.to(torch.bfloat16)
    arguments = flux_call(prompt_embeds=embeddings(1, 7, 32).bfloat16())
    arguments["pooled_prompt_embeds"] = arguments["pooled_prompt_embeds"].bfloat16()
    results = tensors(pipe(**arguments).images)
    pipe.to("cpu", torch.float32)
    return results + run_plain(pipe)


def run_tiled(pipe: Any) -> list[torch.Tensor]:
    """Encode and decode in four tiles and more, which are smaller than the image."""
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size = 8
    pipe.vae.tile_latent_min_size = 4
    return run_image_to_image(pipe)


PLAIN = PipelineEntry("flux", "text-to-image", flux, run_plain, TRANSFORMER_AND_VAE)


def variant(name: str, feature: Feature, run: Any, **changes: Any) -> PipelineEntry:
    return replace(PLAIN, name=name, feature=feature, run=run, **changes)


ENTRIES = (
    PLAIN,
    variant("flux-true-cfg", "text-to-image", run_true_cfg),
    variant(
        "flux-prompt",
        "text-encoder",
        run_prompt,
        build=build_with_text_encoders,
        components=("text_encoder", "text_encoder_2", "transformer", "vae"),
    ),
    variant("flux-image-to-image", "image-to-image", run_image_to_image, build=lambda: flux("FluxImg2ImgPipeline")),
    variant("flux-inpaint", "inpaint", run_inpaint, build=lambda: flux("FluxInpaintPipeline")),
    variant("flux-kontext", "edit", run_kontext, build=lambda: flux("FluxKontextPipeline")),
    variant(
        "flux-controlnet",
        "controlnet",
        run_controlnet,
        build=build_controlnet,
        components=("transformer", "controlnet", "vae"),
    ),
    variant("flux-ip-adapter", "ip-adapter", run_ip_adapter, build=build_ip_adapter),
    variant("flux-lora", "lora", run_lora, build=build_lora),
    variant("flux-lora-fused", "lora", run_plain, build=build_fused_lora),
    variant("flux-lora-changing", "lora", run_changing_lora, build=build_lora),
    variant("flux-callback", "callback", run_callback),
    variant("flux-interrupt", "interrupt", run_interrupt),
    variant("flux-output-types", "output-type", run_output_types),
    variant("flux-several-images", "several-images", run_several_images),
    variant("flux-from-pipe", "from-pipe", run_from_pipe),
    variant("flux-to-bfloat16", "to", run_to_bfloat16),
    variant("flux-tiled-vae", "tiled-vae", run_tiled, build=lambda: flux("FluxImg2ImgPipeline")),
)
