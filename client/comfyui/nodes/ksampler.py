"""Node XDiT KSampler: run the whole denoising loop, and decode the image, in one job of the workers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import nodes
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from xditd.client.comfyui.accelerate import accelerate
from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.families import search_words, titles
from xditd.client.comfyui.fused_sampler import FusedEuler, parts_of
from xditd.client.comfyui.loop_eligibility import why_stepwise
from xditd.client.comfyui.node_text import show_on_node
from xditd.client.comfyui.patcher import WRAPPER_KEY
from xditd.client.comfyui.understood import why_model_changed
from xditd.client.comfyui.vae import weights_of, why_local
from xditd.ipc.limits import MAX_STEPS

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class XditKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="XDiTKSampler",
            display_name="XDiT KSampler",
            category="xDiT",
            description="Runs the whole sampling loop in the workers, in one request. The same seed gives the same "
            "image as KSampler. With a VAE the workers decode too. What their loop cannot do runs step by step, and "
            "the node shows why.",
            search_aliases=["xdit", "multi gpu", "sampler", *search_words()],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=f"MODEL of XDiT UNet Loader, or of another loader, which is then accelerated: {titles()}",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
                io.Int.Input("steps", default=20, min=1, max=MAX_STEPS),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler"),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
                io.Vae.Input("vae", optional=True, tooltip="an xDiT VAE, or a stock one, which is then lent"),
            ],
            outputs=[io.Latent.Output(), io.Image.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae: Any = None, **inputs: Any) -> Any:
        latent, image, note = sample(vae=vae, **inputs)
        if image is None:
            image = ExecutionBlocker("XDiT KSampler: IMAGE needs a VAE; connect one to it, or decode LATENT")
        show_on_node(cls, note)
        return io.NodeOutput(latent, image, ui=ui.PreviewText(note))


def sample(
    *,
    model: Any,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent_image: dict[str, Any],
    denoise: float = 1.0,
    vae: Any = None,
) -> tuple[dict[str, Any], Any, str]:
    """Sample as ComfyUI's KSampler does; returns the latent, the image (None without a VAE) and a note for the node."""
    connect()
    remote = accelerate(model)
    start = comfy.sample.fix_empty_latent_channels(
        remote,
        latent_image["samples"],
        latent_image.get("downscale_ratio_spacial"),
        latent_image.get("downscale_ratio_temporal"),
    )
    sigmas = comfy.samplers.KSampler(
        remote, steps, remote.load_device, sampler_name, scheduler, denoise, remote.model_options
    ).sigmas
    reason = why_stepwise(
        sampler=sampler_name,
        cfg=cfg,
        has_mask=latent_image.get("noise_mask") is not None,
        sigmas=sigmas.tolist(),
        positive=parts_of(positive),
        negative=parts_of(negative),
        family=remote.family,
        model_change=why_model_changed(remote, remote.understood.sampling, WRAPPER_KEY),
        latent_shape=start.shape,
        pixels_per_latent=remote.model.latent_format.spacial_downscale_ratio,
    )
    if reason is not None:
        note = f"step by step: {reason}"
        logger.info("XDiT KSampler runs %s", note)
        (out,) = nodes.common_ksampler(
            remote, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        return out, None if vae is None else vae.decode(out["samples"]), note
    return _run_loop(
        remote,
        start,
        sigmas,
        seed=seed,
        cfg=cfg,
        positive=positive,
        negative=negative,
        latent_image=latent_image,
        vae=vae,
    )


def _run_loop(
    remote: Any,
    start: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    seed: int,
    cfg: float,
    positive: Any,
    negative: Any,
    latent_image: dict[str, Any],
    vae: Any,
) -> tuple[dict[str, Any], Any, str]:
    """Run the whole loop in the workers, from ``start``; returns what :func:`sample` does."""
    noise = comfy.sample.prepare_noise(start, seed, latent_image.get("batch_index"))
    has_previews = latent_preview.get_previewer(remote.load_device, remote.model.latent_format) is not None
    local = None if vae is None else why_local(vae)
    fused = FusedEuler(
        remote.weights,
        remote.family,
        None if vae is None or local is not None else weights_of(vae),
        has_previews=has_previews,
    )
    samples = comfy.sample.sample_custom(
        remote,
        noise,
        cfg,
        fused,
        sigmas,
        positive,
        negative,
        start,
        callback=latent_preview.prepare_callback(remote, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = {key: value for key, value in latent_image.items() if not key.startswith("downscale_ratio_")}
    out["samples"] = samples
    note = f"fused: {len(sigmas) - 1} steps in the workers"
    if local is not None:
        return out, vae.decode(samples), f"{note}; the VAE decodes in ComfyUI: {local}"
    return out, fused.image, note
