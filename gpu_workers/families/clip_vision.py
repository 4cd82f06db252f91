"""CLIP's vision model of ViT-H (``clip_vision_h.safetensors``), which Wan 2.1 reads: it runs as transformers' class.

Files of one model without a configuration: sizes are read from shapes, heads and the activation are those of ViT-H. Its
heads have 80 channels, those of other CLIPs 64 or 104, so that widths tell them apart.

Source: transformers, ``CLIPVisionModelWithProjection``; laion/CLIP-ViT-H-14-laion2B-s32B-b79K, ``config.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Final

from xditd.gpu_workers.models.entries import Shape
from xditd.gpu_workers.models.shapes import count_blocks
from xditd.ipc.tensors import ModuleDescription

HEAD_SIZE: Final = 80
MAX_LAYERS: Final = 128

_PREFIX: Final = "vision_model"
_POSITIONS: Final = f"{_PREFIX}.embeddings.position_embedding.weight"
_PATCHES: Final = f"{_PREFIX}.embeddings.patch_embedding.weight"
_INNER: Final = f"{_PREFIX}.encoder.layers.0.mlp.fc1.weight"
_PROJECTION: Final = "visual_projection.weight"
_TEXT: Final = "text_model."


def describe(shapes: Mapping[str, Shape]) -> ModuleDescription | None:
    """Return the class and the configuration of a file of this model; ``None`` for all others.

    ``shapes`` are those of a file's tensors, by the names in it.
    """
    found = [shapes.get(name, ()) for name in (_POSITIONS, _PATCHES, _INNER)]
    if [len(each) for each in found] != [2, 4, 2] or any(name.startswith(_TEXT) for name in shapes):
        return None
    (positions, width), (_, channels, patch, _), (inner, _) = found
    side = math.isqrt(positions - 1)
    projection = shapes.get(_PROJECTION, ())
    if width % HEAD_SIZE or side * side != positions - 1 or len(projection) not in (0, 2):
        return None
    config = {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": width,
        "image_size": side * patch,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": width // HEAD_SIZE,
        "num_channels": channels,
        "num_hidden_layers": count_blocks("CLIP's vision model", shapes, f"{_PREFIX}.encoder.layers", MAX_LAYERS),
        "patch_size": patch,
    }
    if projection:
        config["projection_dim"] = projection[0]
    name = "CLIPVisionModelWithProjection" if projection else "CLIPVisionModel"
    return ModuleDescription(class_name=f"transformers.models.clip.modeling_clip:{name}", config=json.dumps(config))
