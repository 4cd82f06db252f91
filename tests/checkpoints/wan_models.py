"""For tests, and programs beside them: seeded checkpoints of Wan, plain diffusers on them, and inputs."""

from __future__ import annotations

import math
import zlib
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from xditd.gpu_workers.families.wan.checkpoint import Wan, WanVace
from xditd.gpu_workers.families.wan.config import WanConfig, WanVaceConfig

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

State = dict[str, torch.Tensor]
TEXT = WanConfig(hidden=256, blocks=2, ffn=320, text_channels=48)
IMAGE = replace(TEXT, in_channels=36)
"""Of Wan 2.2: the first image is in the channels alone."""
CLIP_IMAGE = replace(IMAGE, image_channels=64)
"""Of Wan 2.1, with CLIP's vision model."""
TWO_IMAGES = replace(CLIP_IMAGE, has_image_positions=True)
"""Of Wan 2.1 for a first and a last image."""
TI2V = replace(TEXT, in_channels=48, out_channels=48)
VACE = WanVaceConfig(**{each.name: getattr(TEXT, each.name) for each in fields(TEXT)}, control_blocks=1)
TWO_CONTROLS = replace(VACE, blocks=4, control_blocks=2)
CONFIGS = {
    "text": TEXT,
    "image": IMAGE,
    "image with CLIP": CLIP_IMAGE,
    "two images with CLIP": TWO_IMAGES,
    "TI2V": TI2V,
    "VACE": TWO_CONTROLS,
}


def family_of(config: WanConfig) -> Wan:
    return WanVace() if isinstance(config, WanVaceConfig) else Wan()


def state_dict(seed: int, config: WanConfig = TEXT, *, dtype: torch.dtype = torch.float32, prefix: str = "") -> State:
    """Make a checkpoint in the layout of the configuration. Activations keep their size, and every tensor matters."""
    tensors = {}
    for entry in family_of(config).entries(config, ()):
        ((target, _),) = entry.targets
        # By the parameter, so that both namings have the same values.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{target}".encode()))
        values = torch.randn(entry.shape, generator=generator)
        if len(entry.shape) == 1:
            values = 0.2 * values + (1.0 if ".norm" in target and target.endswith(".weight") else 0.0)
        elif target.endswith("scale_shift_table"):
            values = 0.5 * values
        else:
            values = values / math.sqrt(math.prod(entry.shape[1:]))
        tensors[prefix + entry.source] = values.to(dtype)
    return tensors


def empty_reference(config: WanConfig) -> WanTransformer3DModel:
    """Build diffusers' own class in the sizes of a configuration, with nothing of ours."""
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    kind: Any = WanTransformer3DModel
    control: dict[str, Any] = {}
    if isinstance(config, WanVaceConfig):
        kind, control = WanVACETransformer3DModel, {"vace_layers": list(config.control_layers)}
    return kind(
        **control,
        num_attention_heads=config.hidden // 128,
        attention_head_dim=128,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_channels,
        freq_dim=config.time_channels,
        ffn_dim=config.ffn,
        num_layers=config.blocks,
        image_dim=config.image_channels or None,
        added_kv_proj_dim=config.hidden if config.image_channels else None,
        pos_embed_seq_len=514 if config.has_image_positions else None,
    )


def to_diffusers(state: State) -> State:
    """Return the tensors of an original file by diffusers' names, by its own conversion."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted: State = convert_wan_transformer_to_diffusers(dict(state))
    if (positions := converted.pop("img_emb.emb_pos", None)) is not None:  # which that conversion leaves as it is
        converted["condition_embedder.image_embedder.pos_embed"] = positions
    return converted


def reference(state: State, config: WanConfig = TEXT) -> WanTransformer3DModel:
    """Build diffusers' own class from a checkpoint; each parameter has the dtype of its tensor."""
    module = empty_reference(config)
    module.load_state_dict(to_diffusers(state) if config.is_original else state, assign=True)
    return module.eval().requires_grad_(False)


def inputs(
    rows: int,
    tokens: int,
    size: tuple[int, int, int],
    config: WanConfig = TEXT,
    *,
    is_per_token: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Make the arguments of a forward, the same in every process. ``size``: frames, rows and columns of latents.

    All but the timestep have this ``dtype``.
    """
    generator = torch.Generator().manual_seed(rows * 10_000 + tokens * 100 + sum(size))
    timestep = torch.linspace(712.0, 250.5, rows)
    if is_per_token:
        of_row = size[0] * size[1] * size[2] // 4
        kept = torch.rand(of_row, generator=generator) > 0.3  # tokens of a first image have the time 0
        timestep = timestep[:, None] * kept
    given: dict[str, Any] = {
        "hidden_states": torch.randn(rows, config.in_channels, *size, generator=generator),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(
            rows, 512 if config.image_channels else tokens, config.text_channels, generator=generator
        ),
    }
    if config.image_channels:
        images = rows * (2 if config.has_image_positions else 1)
        given["encoder_hidden_states_image"] = torch.randn(images, 257, config.image_channels, generator=generator)
    if isinstance(config, WanVaceConfig):
        given["control_hidden_states"] = torch.randn(rows, 96, *size, generator=generator)
        given["control_hidden_states_scale"] = torch.linspace(1.0, 0.5, config.control_blocks)
    return {name: each if name == "timestep" else each.to(dtype) for name, each in given.items()}


def with_controls(reference: Any, scales: torch.Tensor) -> Any:
    """Let diffusers' class take several controls of each row, (rows, controls, 96, ...), with weights for each block.

    They go through its blocks side by side, in the channels of what was one control.
    """
    controls, embed = scales.shape[0], reference.vace_patch_embedding.forward

    def embed_each(given: torch.Tensor) -> torch.Tensor:
        return torch.cat([embed(each) for each in given.unbind(1)], dim=1)

    reference.vace_patch_embedding.forward = embed_each
    for number, block in enumerate(reference.vace_blocks):

        def run(
            hidden_states: torch.Tensor,
            text: torch.Tensor,
            states: torch.Tensor,
            *more: Any,
            own: Any = block.forward,
            number: int = number,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            results = [own(hidden_states, text, each, *more) for each in states.chunk(controls, dim=-1)]
            total = sum(hint * scales[at, number] for at, (hint, _) in enumerate(results))
            assert isinstance(total, torch.Tensor)
            return total, torch.cat([each for _, each in results], dim=-1)

        block.forward = run
    return reference


def controlled_inputs(rows: int, tokens: int, size: tuple[int, int, int], controls: int, config: Any) -> dict[str, Any]:
    """Make the arguments of a forward with several controls; :func:`controlled_reference` takes them, too."""
    given = inputs(rows, tokens, size, config)
    generator = torch.Generator().manual_seed(controls)
    given["control_hidden_states"] = torch.randn(rows * controls, 96, *size, generator=generator)
    given["control_hidden_states_scale"] = torch.rand(controls, config.control_blocks, generator=generator)
    return given


@torch.no_grad()
def controlled_reference(state: State, config: Any, given: dict[str, Any]) -> torch.Tensor:
    """Return what diffusers' class gives for the arguments of :func:`controlled_inputs`."""
    scales = given["control_hidden_states_scale"]
    module = with_controls(reference(state, config), scales)
    split = given["control_hidden_states"].unflatten(0, (-1, scales.shape[0]))
    plain = {**given, "control_hidden_states": split, "control_hidden_states_scale": None}
    # The class asks the control for ones, of which each block has one weight.
    found: torch.Tensor = module(**plain, return_dict=False)[0]
    return found


def _scheduler(sample: Any, shift: float) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if sample.options.get("euler"):
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


def _sampled(pipeline: Any, sample: Any, dtype: torch.dtype, **given: Any) -> torch.Tensor:
    is_ti2v = sample.config.out_channels == 48
    pipeline.vae_scale_factor_spatial = 16 if is_ti2v else 8
    pipeline.set_progress_bar_config(disable=True)
    texts = ("prompt_embeds", "negative_prompt_embeds")
    found: torch.Tensor = pipeline(
        latents=sample.noise,
        num_inference_steps=sample.steps,
        guidance_scale=sample.scale,
        guidance_scale_2=sample.options.get("guidance_scale_2"),
        output_type="latent",
        return_dict=False,
        **{"num_frames" if name == "frames" else name: each for name, each in sample.sides.items()},
        **{name: each.to(dtype) for name, each in sample.conditioning.items() if name in texts},
        **given,
    )[0]
    return found


@torch.no_grad()
def pipeline_latents(
    module: WanTransformer3DModel, second: WanTransformer3DModel | None, sample: Any, sigmas: Any = None
) -> torch.Tensor:
    """Sample with diffusers' own pipeline, its defaults for what a sample's options do not say."""
    import numpy as np
    from diffusers import WanPipeline

    options = sample.options
    is_ti2v = sample.config.out_channels == 48
    scheduler = _scheduler(sample, 1.0 if sigmas is not None else options.get("shift", 5.0 if is_ti2v else 3.0))
    if sigmas is not None:
        own = scheduler.set_timesteps
        given = list(sigmas) if options.get("euler") else np.array(sigmas)
        scheduler.set_timesteps = lambda _, device: own(sigmas=given, device=device)
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=module,
        transformer_2=second,
        boundary_ratio=None if second is None else options.get("boundary_ratio", 0.875),
        expand_timesteps=is_ti2v,
    )
    return _sampled(pipeline, sample, module.dtype)


@torch.no_grad()
def image_pipeline_latents(
    module: WanTransformer3DModel, second: WanTransformer3DModel | None, vae: Any, sample: Any
) -> torch.Tensor:
    """Sample with diffusers' ``WanImageToVideoPipeline``, from images in [0, 1], whose CLIP states are given."""
    from diffusers import WanImageToVideoPipeline

    conditioning = sample.conditioning
    is_ti2v = sample.config.out_channels == 48
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=_scheduler(sample, sample.options.get("shift", 5.0 if is_ti2v else 3.0)),
        transformer=module,
        transformer_2=second,
        boundary_ratio=None if second is None else sample.options.get("boundary_ratio", 0.9),
        expand_timesteps=is_ti2v,
    )
    if sample.config.image_channels:
        pipeline.encode_image = lambda *_: conditioning["image_embeds"]
    images = {name: (conditioning[name] + 1) / 2 for name in ("image", "last_image") if name in conditioning}
    return _sampled(pipeline, sample, module.dtype, **images)


@torch.no_grad()
def control_pipeline_latents(module: Any, vae: Any, sample: Any) -> torch.Tensor:
    """Sample with diffusers' ``WanVACEPipeline``, from a control video and references on their canvases."""
    from diffusers import WanVACEPipeline

    conditioning, sides = sample.conditioning, sample.sides
    pipeline = WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=_scheduler(sample, sample.options.get("shift", 3.0)),
        transformer=module,
    )
    references = list(conditioning.get("reference_images", ()))
    zeros = torch.zeros(1, 3, sides["frames"], sides["height"], sides["width"])
    video = conditioning.get("video", zeros)
    prepared = video, conditioning.get("mask", torch.ones_like(video)), [references]
    pipeline.preprocess_conditions = lambda *_: prepared
    scales = conditioning.get("conditioning_scales", sample.options.get("conditioning_scale", 1.0))
    found = _sampled(pipeline, sample, module.dtype, conditioning_scale=scales)
    return found[:, :, len(references) :]


def relative_error(ours: torch.Tensor, right: torch.Tensor) -> float:
    return float((ours.double() - right.double()).abs().max() / right.double().abs().max())
