"""Qwen-Image's text encoder in the workers: Qwen2.5-VL 7B, with pictures in prompts of the Edit models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import comfy.text_encoders.qwen_image as stock
import comfy.text_encoders.qwen_vl
import torch

from xditd.client.comfyui.families.language_model_text import (
    checked_language_model,
    embeddings_folders,
    only_file,
    stock_language_model,
)
from xditd.client.comfyui.families.text_adapter import EncoderFile, StockEncoder, TextAdapter, TextModel
from xditd.client.comfyui.stock_text import RemoteTransformer, stock_text_model
from xditd.ipc.errors import BadRequest, Unsupported

IMAGE_TOKEN: Final = 151655
MERGE: Final = 2
"""Patches on a side of a token."""
WIDTH_3B: Final = 2048
"""Of Qwen2.5-VL 3B, which ComfyUI runs with other templates."""

_NEEDS: Final = "Qwen-Image needs Qwen2.5-VL 7B (qwen_2.5_vl_7b.safetensors, qwen_2.5_vl_7b_fp8_scaled.safetensors)"
_VISION: Final = "visual."


class Qwen25VlTransformer(RemoteTransformer):
    """Qwen2.5-VL: pictures are tokens of their own, which ComfyUI puts among those of the text."""

    def preprocess_embed(self, embed: Mapping[str, Any], device: Any) -> tuple[Any, Any]:
        """Return the ids of a picture's tokens (1, tokens, 1), and its patches and grid as ComfyUI makes them."""
        if embed["type"] != "image":
            return None, None
        if not any(name.startswith(_VISION) for name in self._weights.names):
            raise Unsupported(
                f"{self._weights.label}: the prompt has a picture, but the file has no vision tower (tensors "
                f"{_VISION}*); {_NEEDS}"
            )
        patches, grid = comfy.text_encoders.qwen_vl.process_qwen2vl_images(embed["data"])
        tokens = int(grid.prod()) // MERGE**2
        return torch.full((1, tokens, 1), float(IMAGE_TOKEN)), (patches, grid)

    def images(self, ids: torch.Tensor, embeds_info: Sequence[Mapping[str, Any]]) -> Mapping[str, torch.Tensor] | None:
        found = [each["extra"] for each in embeds_info if each.get("type") == "image"]
        if not found:
            return None
        if len(ids) != 1:
            raise Unsupported("XDiT: a prompt with pictures and weights of words; leave out one of them")
        of_picture = torch.zeros_like(ids)
        for each in embeds_info:
            of_picture[0, each["index"] : each["index"] + each["size"]] = 1
        if not torch.equal(of_picture == 1, ids == IMAGE_TOKEN):
            raise Unsupported(
                "XDiT: the prompt has <|image_pad|> without a picture; give as many pictures, or leave it out"
            )
        return {
            "pixel_values": torch.cat([patches for patches, _ in found]).float().cpu(),
            "image_grid_thw": torch.cat([grid for _, grid in found]).cpu(),
            "mm_token_type_ids": of_picture,
        }


class QwenImageText:
    """The family's encoder; see :class:`~xditd.client.comfyui.families.text_adapter.TextAdapter`."""

    title: Final = "Qwen-Image (Qwen2.5-VL 7B)"
    clip_type: Final = "qwen_image"
    clip_files: Final = 1

    def stock_encoder(self, tensors: Mapping[str, torch.Tensor]) -> StockEncoder | None:
        return stock_language_model(tensors)

    def text_model(self, files: Mapping[str, EncoderFile]) -> TextModel:
        """Make Qwen-Image's text model.

        Raises:
            BadRequest: the file is no Qwen2.5-VL 7B.
        """
        file = only_file(files, _NEEDS)
        found = checked_language_model(file, _NEEDS)
        if not found.has_biases or found.width == WIDTH_3B:
            raise BadRequest(f"{file.weights.label}: a language model of {found.width} channels; {_NEEDS}")
        model = stock.te()(device=torch.device("meta"), dtype=torch.float32)
        tokenizer = stock.QwenImageTokenizer(embedding_directory=embeddings_folders())
        return stock_text_model(file, model, tokenizer, found.layers, transformer=Qwen25VlTransformer)


TEXT_ADAPTER: Final[TextAdapter] = QwenImageText()
