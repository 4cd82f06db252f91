"""What jobs hand back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xditd.client.tensor_text import tensor_text
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image


@dataclass(frozen=True, eq=False, repr=False)
class GenerationResult:
    """Latents, and the image where a VAE was named; both belong to the caller.

    ``latents``, shaped as the facts of the transformer say, have the device and dtype of ``noise``, or without it of
    the first conditioning. ``image`` (batch, channels, height, width) is float32 in [-1, 1], on the same device.
    ``timings_ms`` is the slowest worker's by phase, with ``round_trip`` as the client saw it. ``seed`` is the seed that
    was used, ``None`` where ``noise`` was given. ``reused_steps`` is how many steps the step cache spared, counted for
    each image of the batch; 0 without one.
    """

    latents: torch.Tensor
    image: torch.Tensor | None
    timings_ms: dict[str, float]
    seed: int | None
    reused_steps: int = 0

    def to_pil(self, index: int = 0) -> Image.Image:
        """Convert one image of the batch to 8-bit RGB.

        Raises:
            BadRequest: the job named no VAE, so there is no image; or no image of this number.
        """
        if self.image is None:
            raise BadRequest("image: the job named no VAE; pass vae=... to generate, or decode the latents")
        count = len(self.image)
        if not -count <= index < count:
            raise BadRequest(f"index {index}: the batch has {count} images, numbered from 0")
        return image_to_pil(self.image[index])

    def save(self, path: str | os.PathLike[str], index: int = 0) -> Path:
        """Write one image of the batch to a file in one step, in the format that its suffix names.

        Makes the folder, and returns the path with ``~`` replaced.

        Raises:
            BadRequest: as :meth:`to_pil`; or the suffix names no format that can hold the image.
            OutputFailed: the place may not be written or has no room. The result is still here: save it elsewhere.
        """
        from xditd.client.image_files import encode_image, image_format
        from xditd.client.output_files import write_file

        image = self.to_pil(index)
        return write_file(path, encode_image(image, image_format(path, *image.size)))

    def __repr__(self) -> str:
        image = "no image" if self.image is None else f"image {tensor_text(self.image)}"
        return f"<GenerationResult {image}, latents {tensor_text(self.latents)}, seed {self.seed}>"


@dataclass(frozen=True, eq=False, repr=False)
class TextEncoding:
    """What a text encoder makes of tokens, in float32, on their device; both belong to the caller.

    ``hidden_states`` (batch, tokens, width) are the last layer after the final norm. ``pooled`` (batch, width), if it
    was asked for, is the state at the first end-of-text token, not projected, as FLUX.1 takes it.
    """

    hidden_states: torch.Tensor
    pooled: torch.Tensor | None

    def __repr__(self) -> str:
        pooled = "not pooled" if self.pooled is None else f"pooled {tensor_text(self.pooled)}"
        return f"<TextEncoding hidden_states {tensor_text(self.hidden_states)}, {pooled}>"


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
