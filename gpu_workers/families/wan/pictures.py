"""The first and the last image of a video: what the VAE encodes of them, and how a step takes the latents.

Models with 36 channels read a mask and the latents of a video that has these images and zeros between. TI2V has the
latents of the first image in place of the first latent frame, at time 0. CLIP's states of Wan 2.1 are given by the
client.

Source: diffusers, ``pipelines/wan/pipeline_wan_i2v.py``; a test compares the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xditd.gpu_workers.families.wan.config import FRAMES, IMAGE_TOKENS, PATCH, WanConfig
from xditd.gpu_workers.families.wan.facts import IMAGE, IMAGE_EMBEDS, LAST_IMAGE
from xditd.gpu_workers.models.job_checks import check_tensor
from xditd.gpu_workers.models.operations import Wanted
from xditd.ipc.errors import BadRequest

IMAGE_CHANNELS = 3


def videos_of(wanted: Wanted, conditioning: Mapping[str, Any], config: WanConfig) -> dict[str, torch.Tensor]:
    """Return the video of the images, (1 or batch, 3, frames, height, width); empty without an image.

    Raises:
        BadRequest: an image of another size than the video's, of a wrong number, or beyond [-1, 1]; names it.
    """
    first, last = conditioning.get(IMAGE), conditioning.get(LAST_IMAGE)
    for name, image in ((IMAGE, first), (LAST_IMAGE, last)):
        if image is not None:
            check_picture(name, image, wanted)
    if first is None:
        return {}
    video = first.float().unsqueeze(2)
    if config.has_time_per_token:  # the later frames are noise alone
        return {IMAGE: video}
    if last is None:
        return {IMAGE: _extended(video, wanted.frames)}
    if last.shape[0] != first.shape[0]:
        raise BadRequest(f"{LAST_IMAGE}: {last.shape[0]} images, but {IMAGE} has {first.shape[0]}")
    if wanted.frames == 1:
        raise BadRequest(
            f"{LAST_IMAGE}: the video has one frame, which is {IMAGE}; leave it out, or ask for more frames"
        )
    return {IMAGE: torch.cat([_extended(video, wanted.frames - 1), last.float().unsqueeze(2)], dim=2)}


def check_picture(name: str, image: Any, wanted: Wanted) -> None:
    """Check pictures (1 or batch, 3, height, width) of the video's size.

    Raises:
        BadRequest: another size, number or dtype, or values beyond [-1, 1]; names it and what is accepted.
    """
    check_tensor(name, image, (None, IMAGE_CHANNELS, None, None))
    if tuple(image.shape[2:]) != (wanted.height, wanted.width):
        raise BadRequest(
            f"{name}: {image.shape[2]} x {image.shape[3]} pixels, but the video has {wanted.height} x {wanted.width}; "
            "resize it first, as the VideoProcessor of diffusers does"
        )
    check_count(name, image, wanted)
    check_range(name, image, -1.0)


def check_count(name: str, given: torch.Tensor, wanted: Wanted) -> None:
    """Raise ``BadRequest`` unless there is one for each video, or one for all of them."""
    if given.shape[0] not in (1, wanted.batch):
        raise BadRequest(f"{name}: {given.shape[0]} for {wanted.batch} videos: give one for each, or one for all")


def check_range(name: str, given: torch.Tensor, low: float) -> None:
    """Raise ``BadRequest`` if values lie outside ``low`` to 1, but for the rounding of a resize."""
    least, most = (float(each) for each in torch.aminmax(given))
    if not (low - 0.01 <= least and most <= 1.01):
        raise BadRequest(f"{name}: values from {least:g} to {most:g}, use {low:g} to 1")


def _extended(video: torch.Tensor, frames: int) -> torch.Tensor:
    """Return the video with frames of zeros after it, which are grey."""
    batch, channels, given, height, width = video.shape
    return torch.cat([video, video.new_zeros(batch, channels, frames - given, height, width)], dim=2)


@dataclass(frozen=True, eq=False)
class ImageChannels:
    """Channels beside those of the noise, (batch, 20, frames, rows, columns) of latents: a mask, and the images'."""

    channels: torch.Tensor

    @classmethod
    def of(cls, latents: torch.Tensor, noise: torch.Tensor, *, has_last: bool) -> ImageChannels:
        """``latents`` are those of the images' video, ``noise`` those that are denoised."""
        batch, _, frames, rows, columns = noise.shape
        mask = torch.zeros(batch, frames, FRAMES, rows, columns, device=noise.device)
        mask[:, 0] = 1  # the first frame counts as often as a latent frame has frames
        if has_last:
            mask[:, -1, -1] = 1
        return cls(torch.cat([mask.transpose(1, 2), latents.expand(batch, -1, -1, -1, -1)], dim=1))

    def joined(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([latents, self.channels], dim=1)

    def finished(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


@dataclass(frozen=True, eq=False)
class FirstFrame:
    """The latents (1 or batch, channels, 1, rows, columns) of the first frame, which is not denoised."""

    latents: torch.Tensor
    mask: torch.Tensor
    """(1, 1, frames, rows, columns), 0 in the first frame and 1 after it."""

    @classmethod
    def of(cls, latents: torch.Tensor, noise: torch.Tensor) -> FirstFrame:
        mask = torch.ones(1, 1, *noise.shape[2:], dtype=noise.dtype, device=noise.device)
        mask[:, :, 0] = 0
        return cls(latents, mask)

    def joined(self, latents: torch.Tensor) -> torch.Tensor:
        return (1 - self.mask) * self.latents + self.mask * latents

    finished = joined

    @property
    def of_tokens(self) -> torch.Tensor:
        """The mask of tokens, (tokens,)."""
        return self.mask[0, 0, :, :: PATCH[1], :: PATCH[2]].flatten()


@dataclass(frozen=True, eq=False)
class FramesBefore:
    """Latent frames before those of the video, which are denoised with it and left out of the result."""

    count: int

    def joined(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def finished(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :, self.count :]


Condition = ImageChannels | FirstFrame | FramesBefore


def condition_of(config: WanConfig, conditioning: Mapping[str, Any], noise: torch.Tensor) -> Condition | None:
    """Return how steps take the encoded images; ``None`` without any."""
    latents = conditioning.get(IMAGE)
    if latents is None:
        return None
    if config.has_time_per_token:
        return FirstFrame.of(latents, noise)
    return ImageChannels.of(latents, noise, has_last=conditioning.get(LAST_IMAGE) is not None)


def image_states(config: WanConfig, conditioning: Mapping[str, Any], batch: int) -> dict[str, torch.Tensor]:
    """Check the states of CLIP's vision model, and return them by name; empty for models that take none.

    Raises:
        BadRequest: a wrong shape or number; names it and what is accepted.
    """
    if not config.image_channels:
        return {}
    given = conditioning[IMAGE_EMBEDS]
    check_tensor(IMAGE_EMBEDS, given, (None, IMAGE_TOKENS, config.image_channels))
    if given.shape[0] not in (config.images, config.images * batch):
        each = "the first and the last image" if config.images == 2 else "the first image"
        raise BadRequest(
            f"{IMAGE_EMBEDS}: states of {given.shape[0]} images for {batch} videos: give those of {each}, once or for "
            "each video"
        )
    return {IMAGE_EMBEDS: given}


def of_each_row(states: torch.Tensor, images: int, batch: int) -> torch.Tensor:
    """Return the states of ``images`` images for each row, as the class takes them."""
    return states if states.shape[0] == images * batch else states.repeat(batch, 1, 1)
