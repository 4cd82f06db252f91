"""For tests: seeded checkpoints of Qwen2.5-VL, transformers' own class on them, and a processor of texts and images."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from xditd.gpu_workers.families.qwen2_5_vl.checkpoint import Qwen25Vl
from xditd.gpu_workers.families.qwen2_5_vl.config import Qwen25VlConfig, VisionConfig

if TYPE_CHECKING:
    from PIL import Image

State = dict[str, torch.Tensor]
SPECIAL = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
IMAGE_TOKEN = SPECIAL["<|image_pad|>"]
SMALL = Qwen25VlConfig(
    vocabulary=151_680,
    width=128,
    layers=2,
    heads=1,
    key_heads=1,
    inner=160,
    vision=VisionConfig(width=160, blocks=9, inner=96),  # the eighth block sees the whole image
)
TEXT_ALONE = replace(SMALL, vision=None)


@cache
def state_dict(config: Qwen25VlConfig = SMALL, *, naming: str = "comfyui") -> State:
    """Make a checkpoint in which every tensor matters, in the names of ``comfyui`` or ``transformers``, or bare."""
    tensors: State = {}
    for entry in Qwen25Vl().entries(config, ()):
        generator = torch.Generator().manual_seed(zlib.crc32(entry.source.encode()))
        values = torch.randn(entry.shape, generator=generator)
        if entry.source.endswith("bias"):
            values = 0.2 * values
        elif len(entry.shape) == 1:
            values = 1.0 + 0.3 * values
        elif entry.source != "embed_tokens.weight":
            values = values / math.sqrt(math.prod(entry.shape[1:]))
        tensors[spelled(entry.source, naming)] = values
    return tensors


def spelled(name: str, naming: str) -> str:
    """Return how files in a naming spell a canonical name."""
    if naming == "bare":
        return name
    if naming == "comfyui":
        return name if name.startswith("visual.") else f"model.{name}"
    return f"model.{name}" if name.startswith("visual.") else f"model.language_model.{name}"


@cache
def reference(config: Qwen25VlConfig = SMALL) -> Any:
    """Build the class that the pipelines' encoder wraps, from the same weights, with nothing of ours."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    assert config.vision is not None
    text = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": config.vision.blocks,
        "hidden_size": config.vision.width,
        "intermediate_size": config.vision.inner,
        "num_heads": config.vision.width // 80,
        "out_hidden_size": config.width,
    }
    with torch.device("meta"):
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    model.to_empty(device="cpu")
    for part in (model.language_model.rotary_emb, model.visual.rotary_pos_emb):
        part.inv_freq = type(part)(part.config).inv_freq
    named = {name.removeprefix("model."): each for name, each in state_dict(config, naming="transformers").items()}
    model.load_state_dict(named)
    return model.eval().requires_grad_(False)


class Processor:
    """What transformers' ``Qwen2_5_VLProcessor`` makes of texts and images, without torchvision.

    Its tokenizer, of bytes, and its image processor are transformers' own; the tokens of an image are repeated here.
    """

    def __init__(self) -> None:
        from transformers import Qwen2Tokenizer
        from transformers.convert_slow_tokenizer import bytes_to_unicode
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        vocabulary = {each: number for number, each in enumerate(bytes_to_unicode().values())} | SPECIAL
        self.tokenizer = Qwen2Tokenizer(
            vocab=vocabulary, merges=[], pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL)
        )
        self.image_processor = Qwen2VLImageProcessorPil()

    def __call__(self, text: Sequence[str], images: Sequence[Image.Image] | Image.Image | None = None, **_: Any) -> Any:
        from transformers import BatchFeature

        texts, more = list(text), {}
        if images is not None:
            more = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = iter((more["image_grid_thw"].prod(-1) // 4).tolist())
            for number, each in enumerate(texts):
                first, *parts = each.split("<|image_pad|>")
                texts[number] = first + "".join("<|image_pad|>" * next(counts) + part for part in parts)
        found = dict(self.tokenizer(texts, padding=True, return_tensors="pt")) | more
        found["mm_token_type_ids"] = (found["input_ids"] == IMAGE_TOKEN).int()
        return BatchFeature(found)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Make a picture of noise."""
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)
