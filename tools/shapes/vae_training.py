"""Train the VAE of ``shapes``: first both halves, then the decoder alone with latents scaled as FLUX.1's are."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from shapes.draw import OUTLINE, draw
from shapes.models import LATENT_SCALE, LATENT_SHIFT, build_vae
from shapes.pool import autocast, chunks


@dataclass(frozen=True)
class Budget:
    """How long to train: ``steps`` if not 0, else ``seconds``."""

    seconds: float
    steps: int = 0

    def progress(self, started: float, step: int) -> float:
        """Return how much of the training is done, from 0 to 1."""
        if self.steps:
            return step / self.steps
        return min(1.0, (time.monotonic() - started) / max(self.seconds, 1e-9))


@dataclass(frozen=True)
class VaeSettings:
    """Both halves are trained for ``joint`` of the budget, then the decoder."""

    budget: Budget
    batch: int = 48
    rate: float = 1.5e-3
    kl: float = 1e-7
    joint: float = 0.7
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
    data = chunks(settings.seed + 1_000_003, 0, settings.batch, settings.workers)
    started = time.monotonic()
    step = _train(vae, settings, device, data, started, 0, settings.joint)
    print(f"vae: {step} steps with both halves, {time.monotonic() - started:.0f} s", flush=True)
    _rescale(vae, device, data)
    vae.encoder.requires_grad_(False)
    step = _train(vae, settings, device, data, started, step, 1.0)
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
    optimizer = torch.optim.AdamW(parameters, settings.rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    generator = torch.Generator(device)
    begun = settings.budget.progress(started, step)
    first = step
    while (progress := settings.budget.progress(started, step)) < until:
        share = (progress - begun) / max(until - begun, 1e-9)
        rate = settings.rate * (1.0 if is_joint else 0.5) * min(1.0, (step - first + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        generator.manual_seed(settings.seed * 1_000_003 + step)
        outline = OUTLINE if step % 8 >= 6 else 0.0
        images = draw(next(data)[0], device, outline=outline).to(memory_format=torch.channels_last)
        with autocast(device):
            with torch.set_grad_enabled(is_joint):
                posterior = vae.encode(images).latent_dist
            mean = posterior.mean.float()
            noise = torch.randn(mean.shape, generator=generator, device=device)
            if is_joint:
                latents = mean + posterior.std.float() * noise
            else:
                strength = torch.rand(len(mean), 1, 1, 1, generator=generator, device=device) * (0.2 / LATENT_SCALE)
                latents = mean + strength * noise
            target = images
            if is_joint and step % 2:
                latents, target = functional.avg_pool2d(latents, 2), functional.avg_pool2d(images, 2)
            decoded = vae.decode(latents).sample.float()
        loss = functional.l1_loss(decoded, target) + functional.mse_loss(decoded, target)
        if is_joint:
            variance = posterior.logvar.float()
            loss = loss + settings.kl * 0.5 * (mean.square() + variance.exp() - 1 - variance).sum((1, 2, 3)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"vae: step {step} loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
        step += 1
    return step


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
