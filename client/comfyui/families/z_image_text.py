"""Z-Image's text encoder in the workers: Qwen3 4B, of which ComfyUI takes the last layer but one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import comfy.text_encoders.z_image as stock
import torch

from xditd.client.comfyui.families.language_model_text import (
    checked_language_model,
    embeddings_folders,
    only_file,
    stock_language_model,
)
from xditd.client.comfyui.families.text_adapter import EncoderFile, StockEncoder, TextAdapter, TextModel
from xditd.client.comfyui.stock_text import stock_text_model
from xditd.ipc.errors import BadRequest

WIDTHS: Final = frozenset({2560})
"""Of Qwen3 4B; ComfyUI tells its relatives, which other models read, by their widths."""

_NEEDS: Final = "Z-Image needs Qwen3 4B (qwen_3_4b.safetensors)"


class ZImageText:
    """The family's encoder; see :class:`~xditd.client.comfyui.families.text_adapter.TextAdapter`."""

    title: Final = "Z-Image (Qwen3 4B)"
    clip_type: Final = "lumina2"
    clip_files: Final = 1

    def stock_encoder(self, tensors: Mapping[str, torch.Tensor]) -> StockEncoder | None:
        return stock_language_model(tensors)

    def text_model(self, files: Mapping[str, EncoderFile]) -> TextModel:
        """Make Z-Image's text model.

        Raises:
            BadRequest: the file is no Qwen3 4B.
        """
        file = only_file(files, _NEEDS)
        found = checked_language_model(file, _NEEDS)
        if not found.has_head_norms or found.width not in WIDTHS:
            raise BadRequest(f"{file.weights.label}: a language model of {found.width} channels; {_NEEDS}")
        model = stock.te()(device=torch.device("meta"), dtype=torch.float32)
        tokenizer = stock.ZImageTokenizer(embedding_directory=embeddings_folders())
        return stock_text_model(file, model, tokenizer, found.layers)


TEXT_ADAPTER: Final[TextAdapter] = ZImageText()
