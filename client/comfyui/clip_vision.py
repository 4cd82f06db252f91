"""Make a CLIP_VISION that runs in the workers; ComfyUI scales and normalises the images.

Stock holds the layers in the dtype of text encoders and computes in float32. A module that runs as its class computes
in the dtype of its weights, so that these are lent in float32, with the values that stock holds.

Source: ComfyUI 0.33, ``comfy/clip_vision.py`` (``ClipVisionModel``), ``comfy/clip_model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import comfy.clip_vision
import comfy.model_management as management
import torch

from xditd.client.comfyui.patcher import make_patcher, make_weights
from xditd.client.comfyui.weights import RemoteWeights
from xditd.client.pipeline.clip_pictures import DEVIATIONS, MEANS
from xditd.ipc.errors import Unsupported
from xditd.ipc.tensors import ComponentKind

HEAD_SIZE: Final = 80
"""Channels of a head of ViT-H; those of other CLIPs have 64 or 104, so that widths tell them apart."""
PENULTIMATE: Final = -2

_PATCHES: Final = "vision_model.embeddings.patch_embedding.weight"
_POSITIONS: Final = "vision_model.embeddings.position_embedding.weight"
_LAYER: Final = "vision_model.encoder.layers.0.mlp.fc1.weight"
_PROJECTION: Final = "visual_projection.weight"
_READ: Final = ("vision_model.", "visual_projection.")
_NO_WEIGHTS: Final = "position_ids"
_WIDE: Final = ("vision_model.pre_layrnorm.", "vision_model.post_layernorm.", "visual_projection.")
"""Layers that stock holds in float32."""
_OPEN_CLIP: Final = "visual."
_OPEN_CLIP_LAYER: Final = f"{_OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight"
_NEEDS: Final = "XDiT runs CLIP's vision model of ViT-H (clip_vision_h.safetensors), use the stock loader for others"


class RemoteVisionModel(torch.nn.Module):
    """Replaces ComfyUI's module of a vision model; its forward runs in the workers. It has no parameters."""

    def __init__(self, weights: RemoteWeights, *, has_projection: bool) -> None:
        super().__init__()
        self._weights = weights
        self._has_projection = has_projection

    def forward(
        self, pixel_values: torch.Tensor, intermediate_output: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """Return the states after the last layer and after another one, the projected state, and no projection."""
        assert intermediate_output == PENULTIMATE
        # As a tuple: the class of the result needs more of transformers than a ComfyUI may have.
        given = {"pixel_values": pixel_values, "output_hidden_states": True, "return_dict": False}
        first, second, states = self._weights.connect().call(self._weights.in_use, given)
        last, pooled = (second, first) if self._has_projection else (first, second)
        return last, states[intermediate_output], pooled, None


class RemoteClipVision(comfy.clip_vision.ClipVisionModel):
    """ComfyUI's vision model with its module in the workers."""

    def __init__(self, weights: RemoteWeights, *, image_size: int, has_projection: bool) -> None:
        """Set what ComfyUI's class sets from its configuration; it would build a module with weights besides."""
        self.image_size = image_size
        self.image_mean, self.image_std = list(MEANS), list(DEVIATIONS)
        self.model_type = "clip_vision_model"
        self.config = {"model_type": self.model_type, "image_size": image_size}
        self.return_all_hidden_states = False
        self.load_device = management.text_encoder_device()
        self.dtype = management.text_encoder_dtype(self.load_device)
        self.model = RemoteVisionModel(weights, has_projection=has_projection)
        self.patcher = make_patcher(self.model, weights, self.load_device, management.text_encoder_offload_device())
        self.naf = None
        self._label = weights.label

    def load_sd(self, sd: object) -> Any:
        raise Unsupported(f"{self._label}: XDiT's CLIP vision model keeps the weights of its file")

    def get_sd(self) -> Any:
        raise Unsupported(
            f"{self._label}: XDiT's CLIP vision model is held in float32 and cannot be saved; use the stock loader"
        )


def make_clip_vision(tensors: Mapping[str, torch.Tensor], label: str) -> RemoteClipVision:
    """Make a CLIP_VISION from the tensors of a file. They are lent when ComfyUI first encodes an image.

    Raises:
        Unsupported: no vision model of ViT-H, or packed weights.
    """
    given = dict(tensors)
    if _OPEN_CLIP_LAYER in given:
        given = comfy.clip_vision.convert_to_transformers(given, _OPEN_CLIP)
    width = _width(given)
    if width is None:
        raise Unsupported(f"{label}: no CLIP vision model with ComfyUI's names; {_NEEDS}")
    side = math.isqrt(given[_POSITIONS].shape[0] - 1)
    if width % HEAD_SIZE or "multi_modal_projector.linear_1.bias" in given:
        raise Unsupported(f"{label}: a vision model of {width} channels; {_NEEDS}")
    kept = {name: each for name, each in given.items() if name.startswith(_READ) and not name.endswith(_NO_WEIGHTS)}
    packed = [name for name, each in kept.items() if each.dtype not in (torch.float32, torch.float16, torch.bfloat16)]
    if packed:
        found = str(kept[packed[0]].dtype).removeprefix("torch.")
        raise Unsupported(f"{label}: {packed[0]} is {found}; use a file in bfloat16, float16 or float32")
    held = management.text_encoder_dtype(management.text_encoder_device())
    wide = {name: (each if name.startswith(_WIDE) else each.to(held)).float() for name, each in kept.items()}
    weights = make_weights(wide, ComponentKind.MODULE, label, is_whole=True)
    size = side * int(given[_PATCHES].shape[-1])
    return RemoteClipVision(weights, image_size=size, has_projection=_PROJECTION in kept)


def _width(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Return the channels of a vision model in the names of transformers; ``None`` if it is none."""
    shapes = [tensors[name].ndim if name in tensors else 0 for name in (_POSITIONS, _PATCHES, _LAYER)]
    return int(tensors[_POSITIONS].shape[1]) if shapes == [2, 4, 2] else None
