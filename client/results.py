"""What a finished generation hands back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """Latents, and the image where a VAE was named; both belong to the caller.

    ``latents`` (batch, 16, height/8, width/8) have the device and dtype of ``noise``, or of
    ``prompt_embeds`` without it. ``image`` (batch, 3, height, width) is float32 in [-1, 1], on the
    same device. ``timings_ms`` is the slowest worker's by phase, with ``round_trip`` as the client
    saw it. ``seed`` is the seed that was used, ``None`` where ``noise`` was given. ``reused_steps`` is how many steps
    the step cache spared, counted for each image of the batch; 0 without one.
    """

    latents: torch.Tensor
    image: torch.Tensor | None
    timings_ms: dict[str, float]
    seed: int | None
    reused_steps: int = 0

    def to_pil(self, index: int = 0) -> Image.Image:
        """Convert one image of the batch to 8-bit RGB.

        Raises:
            BadRequest: the job named no VAE, so there is no image.
        """
        if self.image is None:
            raise BadRequest("image: the job named no VAE; pass vae=... to generate, or decode the latents")
        return image_to_pil(self.image[index])

    def save(self, path: str | Path, index: int = 0) -> Path:
        """Write one image of the batch to a file, in the format that its suffix names."""
        target = Path(path)
        image = self.to_pil(index)
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
        return target


def image_to_pil(image: torch.Tensor) -> Image.Image:
    """Convert (3, height, width) in [-1, 1] to 8-bit RGB. Values outside are clipped."""
    import ctypes

    import torch
    from PIL import Image

    scaled = (image.detach().to("cpu", torch.float32) / 2 + 0.5).clamp(0, 1) * 255
    pixels = scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    # Not through numpy: torch works without it, and the client does not depend on it.
    return Image.frombytes("RGB", (width, height), ctypes.string_at(pixels.data_ptr(), pixels.nbytes))
