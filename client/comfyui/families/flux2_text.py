"""FLUX.2's text encoders in the workers: Mistral Small 3 of dev, Qwen3 4B and 8B of klein. Three layers are stacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import comfy.text_encoders.flux as stock
import torch

from xditd.client.comfyui.families.language_model_text import (
    FINAL_NORM,
    checked_language_model,
    embeddings_folders,
    find_language_model,
    only_file,
    stock_language_model,
    tokenizer_in,
)
from xditd.client.comfyui.families.text_adapter import EncoderFile, StockEncoder, TextAdapter, TextModel
from xditd.client.comfyui.stock_text import stock_text_model
from xditd.ipc.errors import BadRequest

MISTRAL: Final = "mistral3_24b"
WIDTHS: Final[Mapping[int, str]] = {2560: "qwen3_4b", 4096: "qwen3_8b", 5120: MISTRAL}
"""ComfyUI's names of the encoders, by their widths, by which ComfyUI tells them apart."""
ALL_LAYERS: Final = 40
"""Of Mistral Small 3. Files for FLUX.2 have fewer: ComfyUI then stacks the last state without a norm."""

_TOKENIZERS: Final = {"qwen3_4b": stock.KleinTokenizer, "qwen3_8b": stock.KleinTokenizer8B}
_TEKKEN: Final = "tekken_model"
_NEEDS: Final = (
    "FLUX.2 dev needs Mistral Small 3 in ComfyUI's layout (mistral_3_small_flux2_bf16.safetensors), klein Qwen3 4B or "
    "8B (qwen_3_4b.safetensors, qwen_3_8b.safetensors)"
)


class Flux2Text:
    """The family's encoders; see :class:`~xditd.client.comfyui.families.text_adapter.TextAdapter`."""

    title: Final = "FLUX.2 (Mistral Small 3; klein Qwen3 4B or 8B)"
    clip_type: Final = "flux2"
    clip_files: Final = 1

    def stock_encoder(self, tensors: Mapping[str, torch.Tensor]) -> StockEncoder | None:
        found = find_language_model(tensors)
        is_pruned = found is not None and not found.has_head_norms and found.layers < ALL_LAYERS
        return stock_language_model(tensors, frozenset({FINAL_NORM} if is_pruned else ()))

    def text_model(self, files: Mapping[str, EncoderFile]) -> TextModel:
        """Make FLUX.2's text model.

        Raises:
            BadRequest: the file is none of its encoders.
            Unsupported: a Mistral without a tokenizer.
        """
        file = only_file(files, _NEEDS)
        found = checked_language_model(file, _NEEDS)
        name = WIDTHS.get(found.width)
        if name is None or found.has_biases or found.has_head_norms == (name == MISTRAL):
            raise BadRequest(f"{file.weights.label}: a language model of {found.width} channels; {_NEEDS}")
        given = {"device": torch.device("meta"), "dtype": torch.float32}
        folders = embeddings_folders()
        if found.has_head_norms:
            model, tokenizer = stock.klein_te(model_type=name)(**given), _TOKENIZERS[name](folders)
        else:
            model = stock.flux2_te(pruned=found.layers < ALL_LAYERS)(**given)
            data = {_TEKKEN: tokenizer_in(file, _TEKKEN, _NEEDS)}
            tokenizer = stock.Flux2Tokenizer(folders, tokenizer_data=data)
        return stock_text_model(file, model, tokenizer, found.layers)


TEXT_ADAPTER: Final[TextAdapter] = Flux2Text()
