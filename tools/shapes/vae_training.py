"""Train the VAE of ``shapes``: first both halves, then the decoder alone with latents scaled as FLUX.1's are."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from shapes.budget import Budget
from shapes.chunks import chunks
from shapes.draw import OUTLINE, PIXELS, draw, encode, save_sheet
from shapes.graphs import GraphedStep, adamw, set_rate
from shapes.judge import faults
from shapes.models import LATENT_SCALE, LATENT_SHIFT, build_vae
from shapes.pool import autocast, encode_latents
from shapes.reading import read
from shapes.words import sample_request

CROP: Final = 128
"""Pixels on each side of what both halves are trained on; the decoder then learns whole pictures."""


@dataclass(frozen=True)
class VaeSettings:
    """Both halves are trained for ``joint`` of the budget on crops of two batches, then the decoder on pictures."""

    budget: Budget
    batch: int = 48
    rate: float = 1.5e-3
    kl: float = 1e-7
    joint: float = 0.6
    seed: int = 0
    workers: int = 4


def train_vae(settings: VaeSettings, device: torch.device) -> AutoencoderKL:
    """Train a VAE and return it, float32 on ``device``.

    Half of the steps decode latents at half their resolution to the picture at half its own, which keeps latents
    smooth (Kouzelis et al., "EQ-VAE", 2025). A quarter show outlines, for LoRAs that draw them. The decoder alone
    learns with noise on its latents, so that it forgives a transformer's small errors.
    """
    torch.manual_seed(settings.seed)
    vae = build_vae().to(device, memory_format=torch.channels_last).train()
    data = chunks(settings.seed + 1_000_003, 0, 2 * settings.batch, settings.workers)
    started = time.monotonic()
    step = _train(vae, settings, device, data, started, 0, settings.joint)
    print(f"vae: {step} steps with both halves, {time.monotonic() - started:.0f} s", flush=True)
    _rescale(vae, device, data)
    vae.encoder.requires_grad_(False)
    halves = ((part,) for chunk in data for part in chunk[0].split(settings.batch))
    step = _train(vae, settings, device, halves, started, step, 1.0)
    print(f"vae: {step} steps, {time.monotonic() - started:.0f} s", flush=True)
    return vae.eval().requires_grad_(False)


def _train(
    vae: AutoencoderKL,
    settings: VaeSettings,
    device: torch.device,
    data: Iterator[tuple[torch.Tensor, ...]],
    started: float,
    step: int,
    until: float,
) -> int:
    """Train until a share of the budget is used; the rate falls to nearly nothing at its end. Return the step."""
    is_joint = step == 0
    parameters = [each for each in vae.parameters() if each.requires_grad]
    optimizer = adamw([{"params": parameters}], settings.rate, device, decay=0.01)
    learning = _Learning(vae, optimizer, parameters, settings.kl, is_joint)
    whole, half = (
        GraphedStep(f"vae {name}", update, device)
        for name, update in (("whole", learning.whole), ("half", learning.half))
    )
    generator = torch.Generator(device)
    begun = settings.budget.progress(started, step)
    first = step
    while (progress := settings.budget.progress(started, step)) < until:
        share = (progress - begun) / max(until - begun, 1e-9)
        rate = settings.rate * (1.0 if is_joint else 0.5) * min(1.0, (step - first + 1) / 100)
        set_rate(optimizer, [rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))])
        generator.manual_seed(settings.seed * 1_000_003 + step)
        images = draw(next(data)[0], device, outline=OUTLINE if step % 8 >= 6 else 0.0)
        if is_joint:
            corner = Random(f"{settings.seed} {step}")
            x, y = (corner.randint(0, images.shape[-1] - CROP) for _ in range(2))
            images = images[:, :, y : y + CROP, x : x + CROP]
        images = images.contiguous(memory_format=torch.channels_last)
        places = (len(images), 16, images.shape[2] // 8, images.shape[3] // 8)
        noise = torch.randn(places, generator=generator, device=device)
        if not is_joint:
            noise *= torch.rand(len(images), 1, 1, 1, generator=generator, device=device) * (0.2 / LATENT_SCALE)
        loss = (half if is_joint and step % 2 else whole)(images, noise)
        if step % 100 == 0:
            print(f"vae: step {step} loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
        step += 1
    return step


class _Learning:
    """The two kinds of steps; neither reads a value on the host, so that they can be recorded."""

    def __init__(
        self,
        vae: AutoencoderKL,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
        kl: float,
        is_joint: bool,
    ) -> None:
        self._vae, self._optimizer, self._parameters = vae, optimizer, parameters
        self._kl, self._is_joint = kl, is_joint

    def whole(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self._learn(images, noise, is_half=False)

    def half(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self._learn(images, noise, is_half=True)

    def _learn(self, images: torch.Tensor, noise: torch.Tensor, *, is_half: bool) -> torch.Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(images.device):
            with torch.set_grad_enabled(self._is_joint):
                posterior = self._vae.encode(images).latent_dist
            mean = posterior.mean.float()
            latents = mean + (posterior.std.float() * noise if self._is_joint else noise)
            target = images
            if is_half:
                latents, target = functional.avg_pool2d(latents, 2), functional.avg_pool2d(images, 2)
            decoded = self._vae.decode(latents).sample.float()
        off = decoded - target
        # Differences of neighbours: edges say what a form is, and are few pixels.
        edges = off.diff(dim=2).abs().mean() + off.diff(dim=3).abs().mean()
        loss = off.abs().mean() + off.square().mean() + edges
        if self._is_joint:
            variance = posterior.logvar.float()
            deviation = mean.square() + variance.exp() - 1 - variance
            scale = images.shape[-1] ** 2 / PIXELS**2  # a crop's divergence counts as a picture's
            loss = loss + self._kl / scale * 0.5 * deviation.sum((1, 2, 3)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


@torch.no_grad()
def judged_vae(vae: AutoencoderKL, device: torch.device, *, count: int, seed: int, sheet: Path) -> dict[str, float]:
    """Judge ``count`` drawn pictures after the VAE, which a transformer can hardly surpass; write some to ``sheet``.

    Every other picture has a combination that training never sees.
    """
    rng = Random(seed + 77)
    requests = [sample_request(rng, held_out=at % 2 == 0) for at in range(count)]
    images = draw(encode([each.scene for each in requests]), device)
    latents = encode_latents(vae, images)
    with autocast(device):
        decoded = vae.decode(latents / LATENT_SCALE + LATENT_SHIFT).sample.float()
    save_sheet(torch.cat([images[:8], decoded[:8]]), sheet)
    right = sum(not faults(request, read(image)) for request, image in zip(requests, decoded.cpu(), strict=True))
    return {
        "right": right,
        "of": count,
        "mean_error": round(float((decoded - images).abs().mean()), 5),
        "latent_mean": round(float(latents.mean()), 4),
        "latent_deviation": round(float(latents.std()), 4),
    }


@torch.no_grad()
def _rescale(vae: AutoencoderKL, device: torch.device, data: Iterator[tuple[torch.Tensor, ...]]) -> None:
    """Fold a scale and a shift into the weights, so that latents have the mean and the deviation of FLUX.1's.

    The scale is exact. The shift is not where the decoder pads latents with zeros, so the decoder is trained after it.
    """
    with autocast(device):
        found = torch.cat([vae.encode(draw(next(data)[0], device)).latent_dist.mode().float() for _ in range(4)])
    mean = found.mean((0, 2, 3))
    scale = 1 / (LATENT_SCALE * found.std())
    shift = LATENT_SHIFT - mean * scale
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    half = len(mean)
    out.weight[:half] *= scale
    out.bias[:half] = out.bias[:half] * scale + shift
    out.bias[half:] += 2 * scale.log()
    into.bias -= (into.weight.sum((2, 3)) @ shift) / scale
    into.weight /= scale
    print(
        f"vae: latents had deviation {float(found.std()):.3f}, by channel {found.std((0, 2, 3)).tolist()}", flush=True
    )
