"""ComfyUI sampler that runs the whole denoising loop in the workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch

from xditd.client.comfyui.unsupported import check_forward
from xditd.client.comfyui.weights import RemoteWeights
from xditd.ipc.transports.tensor_views import torch_dtype

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import ModelAdapter


class FusedEuler(comfy.samplers.Sampler):
    """Euler sampler whose loop is one job in the workers; ComfyUI prepares conditioning, sigmas and noise as always.

    ``image`` is the decoded image (batch, height, width, 3) in [0, 1], if ``vae`` was given.
    """

    def __init__(
        self,
        weights: RemoteWeights,
        family: ModelAdapter,
        vae: RemoteWeights | None,
        *,
        has_previews: bool = False,
    ) -> None:
        self._weights = weights
        self._family = family
        self._vae = vae
        self._has_previews = has_previews
        self.image: torch.Tensor | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: Mapping[str, Any],
        callback: Callable[[int, torch.Tensor, torch.Tensor, int], None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """Denoise ``noise``; Cancel ends the job in the workers after the current step."""
        check_forward(extra_args["model_options"].get("transformer_options", {}))
        sampling = model_wrap.inner_model.model_sampling
        start = sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        shape = start.shape
        if self._family.has_frame_axis:  # of one frame, which the workers' loop does not have
            start = start.squeeze(2)
        rows, _, height, width = start.shape
        (part,) = model_wrap.conds["positive"]
        conditioning, guidance_scale = self._family.loop_inputs(part["model_conds"], rows)
        client, loan = self._weights.connect(), self._weights.in_use
        facts, dtype = loan.facts.transformer, torch_dtype(loan.facts.dtype)
        assert facts is not None
        pixels = facts.latents.pixels
        with client.generate(
            loan,
            {name: _rows(value, rows, dtype) for name, value in conditioning.items()},
            vae=None if self._vae is None else self._vae.loan,
            height=height * pixels,
            width=width * pixels,
            steps=len(sigmas) - 1,
            sigmas=sigmas[:-1],
            guidance_scale=guidance_scale,
            noise=start,
            previews=self._has_previews,
            variant=self._family.variant,
        ) as job:
            for event in job:
                comfy.model_management.throw_exception_if_processing_interrupted()
                if callback is not None:
                    shown = job.denoised() if self._has_previews else start
                    callback(event.step - 1, shown.reshape(shape), start.reshape(shape), event.total_steps)
            result = job.result()
        if result.image is not None:
            self.image = result.image.float().add(1.0).div(2.0).clamp(0.0, 1.0).movedim(1, -1)
        samples: torch.Tensor = sampling.inverse_noise_scaling(sigmas[-1], result.latents.reshape(shape))
        return samples


def parts_of(conditioning: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the parts of a CONDITIONING, each with all its options and its embeddings under ``cross_attn``."""
    return [
        {**part[1], "cross_attn": part[0] if part[0] is not None else part[1].get("cross_attn")}
        for part in conditioning
    ]


def _rows(value: Any, rows: int, dtype: torch.dtype) -> Any:
    """Return ``rows`` rows of conditioning, cast to the dtype of the weights as ComfyUI does."""
    if isinstance(value, torch.Tensor):
        return comfy.utils.repeat_to_batch_size(value, rows).to(dtype)
    return [each.to(dtype) for each in value]
