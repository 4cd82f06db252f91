"""Whole generations by family: diffusers' own pipeline with random weights, and the same work for a daemon."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import logging
from measuring import synchronize
from parts.modules import build

Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Generation:
    """One family's pipeline with its weights on the device, and the inputs of a generation."""

    pipeline: Any
    """Of diffusers, without a text encoder; ``transformer`` and ``vae`` have the weights that a daemon is lent."""
    conditioning: Mapping[str, torch.Tensor]
    """Named alike in the pipeline and in :meth:`xditd.client.Client.generate`."""
    noise: torch.Tensor
    """As ``Client.generate`` takes it."""
    sides: Mapping[str, int]
    """``height``, ``width`` and, of videos, ``frames``."""
    guidance: float
    """The family's own: above 1, Wan and Qwen-Image run two forwards a step."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline."""
    unpacked: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents
    """Returns the pipeline's latents in the shape of ``noise``."""

    def bytes_by_part(self) -> dict[str, int]:
        parts = {name: getattr(self.pipeline, name) for name in ("transformer", "vae")}
        return {
            name: sum(each.nbytes for each in (*part.parameters(), *part.buffers())) for name, part in parts.items()
        }


@dataclass(eq=False)
class Ran:
    """One run of a pipeline: latents in the shape of the noise, images in [0, 1], milliseconds."""

    latents: torch.Tensor
    images: torch.Tensor
    step_ms: float
    """The steps with what comes before them, by their number."""
    decode_ms: float
    whole_ms: float


class StepClock:
    """Marks when the device has finished each step of a pipeline, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.latents: torch.Tensor | None = None
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._is_cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter() * 1e3)

    def after_step(self, _: Any, __: int, ___: Any, tensors: Arguments) -> Arguments:
        """For ``callback_on_step_end``."""
        self.latents = tensors["latents"]
        self.mark()
        return tensors

    def between(self, first: int, last: int) -> float:
        """Return the milliseconds between two marks; the device has been synchronized."""
        begin, end = self._marks[first], self._marks[last]
        return float(begin.elapsed_time(end)) if self._is_cuda else end - begin


@torch.no_grad()
def run_pipeline(generation: Generation, steps: int) -> Ran:
    """Generate once in this process, with decode."""
    device = generation.noise.device
    clock = StepClock(device)
    sides = {"num_frames" if name == "frames" else name: each for name, each in generation.sides.items()}
    synchronize(device)
    began = time.perf_counter()
    clock.mark()
    (images,) = generation.pipeline(
        num_inference_steps=steps,
        output_type="pt",
        return_dict=False,
        callback_on_step_end=clock.after_step,
        **sides,
        **generation.conditioning,
        **generation.arguments,
    )
    clock.mark()
    synchronize(device)
    whole_ms = (time.perf_counter() - began) * 1e3
    assert clock.latents is not None
    return Ran(
        latents=generation.unpacked(clock.latents),
        images=images,
        step_ms=clock.between(0, -2) / steps,
        decode_ms=clock.between(-2, -1),
        whole_ms=whole_ms,
    )


def make(name: str, device: torch.device, dtype: torch.dtype, *, small: bool) -> Generation:
    """Build one of :data:`FAMILIES`; random weights and inputs are the same each time on a device."""
    logging.set_verbosity_error()  # Qwen-Image's pipeline warns in every generation that there is no mask
    generation = FAMILIES[name](device, dtype, small)
    generation.pipeline.set_progress_bar_config(disable=True)
    return generation


def _wan(device: torch.device, dtype: torch.dtype, small: bool) -> Generation:
    """Build Wan 2.1 14B: 81 frames of 832x480, guided."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    config = {"num_layers": 2, "num_attention_heads": 2, "text_dim": 64, "ffn_dim": 256} if small else {}
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=build("AutoencoderKLWan", {"base_dim": 8} if small else {}, device, dtype),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=build("WanTransformer3DModel", config, device, dtype),
    )
    width, height, frames = (96, 64, 9) if small else (832, 480, 81)
    texts = torch.randn(2, 1, 16 if small else 512, config.get("text_dim", 4096), device=device, dtype=dtype)
    noise = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device=device)
    return Generation(
        pipeline=pipeline,
        conditioning={"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]},
        noise=noise,
        sides={"height": height, "width": width, "frames": frames},
        guidance=5.0,
        arguments={"latents": noise, "guidance_scale": 5.0},
    )


def _qwen_image(device: torch.device, dtype: torch.dtype, small: bool) -> Generation:
    """Build Qwen-Image: 1024x1024, true guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    from xditd.gpu_workers.families.qwen_image.config import SCHEDULER

    config = {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64} if small else {}
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=build("AutoencoderKLQwenImage", {"base_dim": 8} if small else {}, device, dtype),
        text_encoder=None,
        tokenizer=None,
        transformer=build("QwenImageTransformer2DModel", config, device, dtype),
    )
    side = 128 if small else 1024
    shape = (2, 1, 16 if small else 256, config.get("joint_attention_dim", 3584))
    texts = torch.randn(shape, device=device, dtype=dtype)
    noise = torch.randn(1, 16, side // 8, side // 8, device=device, dtype=dtype)
    return Generation(
        pipeline=pipeline,
        conditioning={"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]},
        noise=noise,
        sides={"height": side, "width": side},
        guidance=4.0,
        arguments={"latents": QwenImagePipeline._pack_latents(noise, *noise.shape), "true_cfg_scale": 4.0},
        unpacked=lambda latents: QwenImagePipeline._unpack_latents(latents, side, side, 8).squeeze(2),
    )


def _flux2(device: torch.device, dtype: torch.dtype, small: bool) -> Generation:
    """Build FLUX.2-dev: 1024x1024, guidance as an input of the transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    from xditd.gpu_workers.families.flux2.config import SCHEDULER

    config: Arguments = {}
    if small:
        config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64}
    vae = build("AutoencoderKLFlux2", {"block_out_channels": (64, 64, 64, 64)} if small else {}, device, dtype)
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae.to(dtype),  # the statistics of its batch norm are buffers, which keep float32
        text_encoder=None,
        tokenizer=None,
        transformer=build("Flux2Transformer2DModel", config, device, dtype),
    )
    side = 128 if small else 1024
    shape = (1, 16 if small else 512, config.get("joint_attention_dim", 15360))
    noise = torch.randn(1, 128, side // 16, side // 16, device=device, dtype=dtype)
    return Generation(
        pipeline=pipeline,
        conditioning={"prompt_embeds": torch.randn(shape, device=device, dtype=dtype)},
        noise=noise,
        sides={"height": side, "width": side},
        guidance=4.0,
        arguments={"latents": noise, "guidance_scale": 4.0},
        unpacked=lambda latents: latents.transpose(1, 2).unflatten(2, noise.shape[2:]),
    )


FAMILIES = {"wan": _wan, "qwen_image": _qwen_image, "flux2": _flux2}
