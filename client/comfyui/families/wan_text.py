"""Wan's text encoder in the workers: UMT5, whose padding is masked and has states of zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import comfy.model_management as management
import comfy.text_encoders.wan
import torch

from xditd.client.comfyui.families.language_model_text import embeddings_folders, only_file, tokenizer_in
from xditd.client.comfyui.families.text_adapter import EncoderFile, StockEncoder, TextAdapter, TextModel
from xditd.client.comfyui.stock_text import count_layers, stock_text_model
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

_NEEDS: Final = "Wan needs UMT5 in ComfyUI's layout (umt5_xxl_fp16.safetensors, umt5_xxl_fp8_e4m3fn_scaled.safetensors)"
_BLOCKS: Final = "encoder.block"
_OWN_TABLE: Final = f"{_BLOCKS}.1.layer.0.SelfAttention.relative_attention_bias.weight"
_LAST_NORM: Final = "encoder.final_layer_norm.weight"
_TABLES: Final = ("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")
_TOKENIZER: Final = "spiece_model"


class WanText:
    """The family's encoder; see :class:`~xditd.client.comfyui.families.text_adapter.TextAdapter`."""

    title: Final = "Wan (UMT5)"
    clip_type: Final = "wan"
    clip_files: Final = 1

    def stock_encoder(self, tensors: Mapping[str, torch.Tensor]) -> StockEncoder | None:
        """Return how stock ComfyUI holds UMT5: in the dtype of its last norm.

        Source: ComfyUI 0.33, ``comfy/text_encoders/sd3_clip.py`` (``t5_xxl_detect``), ``comfy/text_encoders/wan.py``.
        """
        if not is_umt5(tensors):
            return None
        chosen = management.text_encoder_dtype(management.text_encoder_device())
        dtype = tensors[_LAST_NORM].dtype if _LAST_NORM in tensors else chosen
        return StockEncoder(dtype, lambda name: name.endswith(_TABLES))

    def text_model(self, files: Mapping[str, EncoderFile]) -> TextModel:
        """Make Wan's text model.

        Raises:
            BadRequest: the file is no UMT5.
            Unsupported: it holds no tokenizer.
        """
        file = only_file(files, _NEEDS)
        if not is_umt5(file.weights.names):
            raise BadRequest(f"{file.weights.label}: not such an encoder; {_NEEDS}")
        data = {_TOKENIZER: tokenizer_in(file, _TOKENIZER, _NEEDS)}
        stock = comfy.text_encoders.wan.te()(device=torch.device("meta"), dtype=torch.float32)
        tokenizer = comfy.text_encoders.wan.WanT5Tokenizer(
            embedding_directory=embeddings_folders(), tokenizer_data=data
        )
        layers = count_layers(file.weights.names, _BLOCKS)
        return stock_text_model(file, stock, tokenizer, layers, has_branches=True)


def is_umt5(names: Iterable[str]) -> bool:
    """Return whether an encoder with tensors of these names is UMT5: its blocks have tables of their own."""
    return _OWN_TABLE in names


TEXT_ADAPTER: Final[TextAdapter] = WanText()
