"""What text encoders that are language models share: how stock ComfyUI holds them, and what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import comfy.model_management as management
import folder_paths

from xditd.client.comfyui.families.text_adapter import EncoderFile, StockEncoder
from xditd.client.comfyui.stock_text import count_layers
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.name_lists import listed

if TYPE_CHECKING:
    import torch

LAYERS: Final = "model.layers"
FINAL_NORM: Final = "model.norm.weight"

_TOKENS: Final = "model.embed_tokens.weight"
_DTYPE_OF: Final = (FINAL_NORM, f"{LAYERS}.0.input_layernorm.weight")
_QUERY: Final = f"{LAYERS}.0.self_attn.q_proj.weight"
_HEAD_NORM: Final = f"{LAYERS}.0.self_attn.q_norm.weight"
_BIAS: Final = f"{LAYERS}.0.self_attn.k_proj.bias"
_OTHERS: Final = ("deepstack", "post_feedforward_layernorm", "linear_attn", "self_attn.sinks")
"""Parts of names that only relatives have: Qwen3-VL, Gemma, Qwen3.5 and gpt-oss."""


@dataclass(frozen=True)
class LanguageModel:
    """What names and shapes say of a language model."""

    width: int
    layers: int
    has_head_norms: bool
    has_biases: bool
    has_final_norm: bool


def find_language_model(shapes: Mapping[str, torch.Tensor]) -> LanguageModel | None:
    """Return what a file's tensors say of a language model with ComfyUI's names; ``None`` if it is none."""
    if _TOKENS not in shapes or _QUERY not in shapes or any(other in name for name in shapes for other in _OTHERS):
        return None
    return LanguageModel(
        width=int(shapes[_TOKENS].shape[1]),
        layers=count_layers(list(shapes), LAYERS),
        has_head_norms=_HEAD_NORM in shapes,
        has_biases=_BIAS in shapes,
        has_final_norm=FINAL_NORM in shapes,
    )


def stock_language_model(
    tensors: Mapping[str, torch.Tensor], unused: frozenset[str] = frozenset()
) -> StockEncoder | None:
    """Return how stock ComfyUI holds a language model: in the dtype of its norms.

    Source: ComfyUI 0.33, ``comfy/text_encoders/hunyuan_video.py`` (``llama_detect``).
    """
    if find_language_model(tensors) is None:
        return None
    found = next((tensors[name].dtype for name in _DTYPE_OF if name in tensors), None)
    dtype = management.text_encoder_dtype(management.text_encoder_device()) if found is None else found
    return StockEncoder(dtype, lambda name: name == _TOKENS, unused)


def only_file(files: Mapping[str, EncoderFile], needs: str) -> EncoderFile:
    """Return the one file that there is; ``needs`` names what it must be.

    Raises:
        BadRequest: several files.
    """
    if len(files) != 1:
        raise BadRequest(f"{listed(files, joint=' and ')}: {needs}; choose one file")
    return next(iter(files.values()))


def checked_language_model(file: EncoderFile, needs: str) -> LanguageModel:
    """Return what a file's tensors say of its language model; ``needs`` names what it must be, for an error.

    Raises:
        BadRequest: it is no language model with ComfyUI's names.
    """
    found = find_language_model(file.weights.shapes)
    if found is None:
        raise BadRequest(f"{file.weights.label}: no such encoder with ComfyUI's names; {needs}")
    return found


def tokenizer_in(file: EncoderFile, name: str, needs: str) -> torch.Tensor:
    """Return the tensor of a file that is its tokenizer.

    Raises:
        Unsupported: there is none, as in GGUF files and files of other programs.
    """
    if name not in file.tokenizers:
        raise Unsupported(
            f"{file.weights.label}: it has no tensor {name}, which is the tokenizer that ComfyUI reads; {needs}"
        )
    return file.tokenizers[name]


def embeddings_folders() -> list[str]:
    """Return ComfyUI's folders of textual inversion embeddings."""
    found: list[str] = folder_paths.get_folder_paths("embeddings")
    return found
