"""Pictures for CLIP's vision model, as transformers' image processor makes them."""

from __future__ import annotations

import pytest
import torch
from pipeline_parts import image

from xditd.client.pipeline.clip_pictures import clip_pixels


@pytest.mark.parametrize("size", [(300, 260), (224, 224), (100, 333), (500, 225)])
def test_pixels_are_those_of_the_image_processor(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor()
    picture = image(*size)
    right = processor(images=picture, return_tensors="pt").pixel_values
    found = clip_pixels(picture)
    assert found.shape == right.shape
    assert float((found - right).abs().max()) <= 1e-5
    assert found.dtype == torch.float32
