"""Wan VACE: a control video with a mask and reference images, as diffusers' ``WanVACEPipeline`` takes them.

The VAE encodes two videos: what the mask keeps, and what it lets the model make anew. References are latent frames
before the video, denoised with it and left out of the result.

Source: diffusers, ``pipelines/wan/pipeline_wan_vace.py``; a test compares the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import torch

from xditd.gpu_workers.families.wan.checks import check_split, check_texts, check_timestep, check_video
from xditd.gpu_workers.families.wan.config import CONTROL_CHANNELS, FRAMES, WanConfig, WanVaceConfig
from xditd.gpu_workers.families.wan.facts import (
    COMFYUI,
    CONTROL_SCALE,
    CONTROL_SCALES,
    MASK,
    PROMPT,
    REFERENCES,
    VIDEO,
    vace_facts,
)
from xditd.gpu_workers.families.wan.operations import WanOperations
from xditd.gpu_workers.families.wan.pictures import (
    IMAGE_CHANNELS,
    Condition,
    FramesBefore,
    check_count,
    check_range,
)
from xditd.gpu_workers.families.wan.recipe import LIMITS, WanRecipe
from xditd.gpu_workers.families.wan.vace_module import WanVaceModule
from xditd.gpu_workers.models.job_checks import check_batch, check_shape, check_tensor, prepare
from xditd.gpu_workers.models.operations import CallOptions, Inputs, Model, RowResults, Wanted
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import TransformerFacts

_CONTROL: Final = "control_hidden_states"
_SCALE: Final = "control_hidden_states_scale"
_KEPT: Final = f"{VIDEO} (kept)"
_MADE: Final = f"{VIDEO} (made anew)"
"""The two videos that the VAE encodes, by the names that errors give them."""


class WanVaceRecipe(WanRecipe):
    """See :class:`~xditd.gpu_workers.models.picture_recipes.PictureRecipe`."""

    limits = LIMITS | {CONTROL_SCALE: (-100.0, 100.0)}

    def pictures(
        self, config: WanConfig, wanted: Wanted, conditioning: Mapping[str, Any]
    ) -> Mapping[str, torch.Tensor]:
        video, mask = conditioning.get(VIDEO), conditioning.get(MASK)
        if video is None and mask is not None:
            raise BadRequest(f"{MASK} without {VIDEO} would have no effect: leave it out, or give the video")
        if conditioning.get(CONTROL_SCALES) is not None and CONTROL_SCALE in wanted.options:
            raise BadRequest(f"options: {CONTROL_SCALE} beside {CONTROL_SCALES} would have no effect: give one of them")
        references = _references(conditioning, wanted)
        if video is None:
            shape = (1, IMAGE_CHANNELS, wanted.frames, wanted.height, wanted.width)
            grey = torch.zeros(shape, device=conditioning[PROMPT].device)
            return {_KEPT: grey, **references}  # so is what is made anew
        _check_video(VIDEO, video, IMAGE_CHANNELS, wanted)
        check_range(VIDEO, video, -1.0)
        if mask is None:
            return {_KEPT: torch.zeros_like(video), _MADE: video, **references}
        _check_video(MASK, mask, 1, wanted)
        check_range(MASK, mask, 0.0)
        if mask.shape[0] != video.shape[0]:
            raise BadRequest(f"{MASK}: {mask.shape[0]} masks, but {VIDEO} has {video.shape[0]}")
        made = (mask > 0.5).to(video.dtype)
        return {_KEPT: video * (1 - made), _MADE: video * made, **references}

    def noise_frames(self, wanted: Wanted, conditioning: Mapping[str, Any]) -> int:
        return wanted.frames + FRAMES * len(conditioning.get(REFERENCES) or ())

    def conditions(
        self, model: Model[WanConfig], wanted: Wanted, conditioning: Mapping[str, Any], noise: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], Condition | None]:
        config = cast(WanVaceConfig, model.config)
        count = len(conditioning.get(REFERENCES) or ())
        # The pipeline rounds latents to the VAE's dtype, and all of the control then to the transformer's.
        dtype = cast(torch.dtype, wanted.vae_dtype)
        kept = conditioning[_KEPT].to(dtype)
        latents = torch.cat([kept, conditioning[_MADE].to(dtype) if _MADE in conditioning else kept], dim=1)
        for number in range(count):  # each before those before it
            one = conditioning[_name(number)].to(dtype)
            before = torch.cat([one, torch.zeros_like(one)], dim=1).expand(latents.shape[0], -1, -1, -1, -1)
            latents = torch.cat([before, latents], dim=2)
        masks = _mask_channels(conditioning.get(MASK), latents, count)
        control = torch.cat([latents, masks], dim=1).to(model.dtype)
        fixed = {_CONTROL: control.expand(wanted.batch, -1, -1, -1, -1), _SCALE: _scales(config, wanted, conditioning)}
        fixed[_SCALE] = prepare(model, **{CONTROL_SCALES: fixed[_SCALE]})[0]
        return fixed, FramesBefore(count)


class WanVaceOperations(WanOperations):
    """See :class:`~xditd.gpu_workers.models.operations.TransformerOperations`."""

    name = "wan_vace"
    title = "Wan VACE"
    class_name = "WanVACETransformer3DModel"
    of_all_rows = frozenset({_SCALE})
    several_of_a_row = frozenset({_CONTROL})
    recipe = WanVaceRecipe()

    def build(self, config: WanConfig) -> torch.nn.Module:
        return WanVaceModule(cast(WanVaceConfig, config))

    def facts(self, config: WanConfig, layout: ParallelLayout) -> TransformerFacts:
        return vace_facts(cast(WanVaceConfig, config), layout)

    def check(self, model: Model[WanConfig], inputs: Inputs) -> None:
        given, config = inputs.arguments, cast(WanVaceConfig, model.config)
        video, control = given["hidden_states"], given[_CONTROL]
        tokens = check_video("hidden_states", video, config.in_channels, model.dtype)
        rows = video.shape[0]
        check_batch("hidden_states", rows)
        check_texts("encoder_hidden_states", given["encoder_hidden_states"], rows, config, model.dtype)
        check_shape("timestep", given["timestep"], (rows,))
        check_timestep(given["timestep"], inputs.known, rows, tokens)
        controls = _check_scales(given.get(_SCALE), config, model.dtype)
        check_tensor(_CONTROL, control, (rows * controls, CONTROL_CHANNELS, None, *video.shape[3:]), model.dtype)
        if control.shape[2] > video.shape[2]:
            raise BadRequest(
                f"{_CONTROL}: {control.shape[2]} frames of latents, but hidden_states has {video.shape[2]}"
            )
        check_split(model.layout, tokens)

    def run(self, model: Model[WanConfig], inputs: Inputs, options: CallOptions) -> RowResults:
        cast(WanVaceModule, model.module).use(is_comfyuis=options.variant == COMFYUI)
        given = {**inputs.arguments, "return_dict": False}
        found = model.planned.run(given, key=options.variant, loras=options.loras)
        return cast(torch.Tensor, found[0])


def _check_scales(scales: Any, config: WanVaceConfig, dtype: torch.dtype) -> int:
    """Check the weights of control blocks; return the number of controls of each row.

    Raises:
        BadRequest: they are neither (control blocks,) in ``dtype`` nor (controls, control blocks) in float32.
    """
    if isinstance(scales, torch.Tensor) and scales.ndim == 2:
        check_shape(_SCALE, scales, (None, config.control_blocks))
        if scales.dtype != torch.float32:
            raise BadRequest(f"{_SCALE}: dtype is {str(scales.dtype).removeprefix('torch.')}, use float32 for controls")
        return scales.shape[0]
    if scales is not None:
        check_tensor(_SCALE, scales, (config.control_blocks,), dtype)
    return 1


def _name(number: int) -> str:
    return f"{REFERENCES}[{number}]"


def _references(conditioning: Mapping[str, Any], wanted: Wanted) -> dict[str, torch.Tensor]:
    """Check the references, and return them as videos of one frame, by name.

    Raises:
        BadRequest: no list, or another size than the video's; names the reference.
    """
    given = conditioning.get(REFERENCES)
    if given is None:
        return {}
    if not isinstance(given, (list, tuple)) or not given:
        raise BadRequest(f"{REFERENCES}: {type(given).__name__} where a list is needed, with a tensor for each")
    found = {_name(number): each for number, each in enumerate(given)}
    for name, each in found.items():
        check_tensor(name, each, (IMAGE_CHANNELS, None, None))
        if tuple(each.shape[1:]) != (wanted.height, wanted.width):
            raise BadRequest(
                f"{name}: {each.shape[1]} x {each.shape[2]} pixels, but the video has {wanted.height} x "
                f"{wanted.width}; put it on a white canvas of this size, as WanVACEPipeline does"
            )
        check_range(name, each, -1.0)
    return {name: each[None, :, None] for name, each in found.items()}


def _check_video(name: str, video: Any, channels: int, wanted: Wanted) -> None:
    """Raise ``BadRequest`` unless ``video`` is (1 or batch, channels, frames, height, width) of the video's size."""
    check_tensor(name, video, (None, channels, None, None, None))
    check_count(name, video, wanted)
    if video.shape[2] != wanted.frames:
        raise BadRequest(f"{name}: {video.shape[2]} frames, but the video has {wanted.frames}")
    if tuple(video.shape[3:]) != (wanted.height, wanted.width):
        raise BadRequest(
            f"{name}: {video.shape[3]} x {video.shape[4]} pixels, but the video has {wanted.height} x {wanted.width}; "
            "resize it first"
        )


def _mask_channels(mask: torch.Tensor | None, latents: torch.Tensor, references: int) -> torch.Tensor:
    """Return the pixels of a mask as channels, (videos, 64, frames, rows, columns) of latents; 0 in references.

    Without a mask all is made anew.
    """
    videos, _, frames, rows, columns = latents.shape
    frames -= references
    if mask is None:
        made = latents.new_ones(videos, _PIXELS * _PIXELS, frames, rows, columns, dtype=torch.float32)
    else:
        pixels = mask.to(latents.device, torch.float32).clamp(0, 1)[:, 0]
        pixels = pixels.unflatten(2, (rows, _PIXELS)).unflatten(4, (columns, _PIXELS))
        made = pixels.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
        made = torch.nn.functional.interpolate(made, size=(frames, rows, columns), mode="nearest-exact")
    none = made.new_zeros(videos, _PIXELS * _PIXELS, references, rows, columns)
    return torch.cat([none, made], dim=2)


_PIXELS: Final = 8
"""Pixels on a side for each latent of Wan 2.1's VAE."""


def _scales(config: WanVaceConfig, wanted: Wanted, conditioning: Mapping[str, Any]) -> torch.Tensor:
    """Return the weight of each control block, (control blocks,).

    Raises:
        BadRequest: another number of weights.
    """
    given = conditioning.get(CONTROL_SCALES)
    if given is not None:
        check_tensor(CONTROL_SCALES, given, (config.control_blocks,))
        return cast(torch.Tensor, given)
    return torch.tensor([float(wanted.options.get(CONTROL_SCALE, 1.0))] * config.control_blocks)
