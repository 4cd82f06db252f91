"""A picture as CLIP's vision model takes it: resized and cropped to 224 pixels, with its mean and deviation.

Source: transformers, ``CLIPImageProcessor`` with the values of ``openai/clip-vit``; a test compares the pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from PIL import Image

SIDE: Final = 224
MEANS: Final = (0.48145466, 0.4578275, 0.40821073)
DEVIATIONS: Final = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(picture: Image.Image) -> torch.Tensor:
    """Return a picture in RGB as pixel values (1, 3, 224, 224), float32."""
    import torch
    from PIL import Image

    width, height = picture.size
    short, long = min(width, height), max(width, height)
    resized = (SIDE, int(SIDE * long / short)) if width <= height else (int(SIDE * long / short), SIDE)
    picture = picture.resize(resized, resample=Image.Resampling.BICUBIC)
    left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
    picture = picture.crop((left, top, left + SIDE, top + SIDE))
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    levels = flat.view(SIDE, SIDE, 3).permute(2, 0, 1)[None].to(torch.float32) * (1 / 255)
    means, deviations = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEANS, DEVIATIONS))
    return ((levels - means) / deviations).contiguous()
