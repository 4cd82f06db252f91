"""FLUX.1's text encoders in the workers: CLIP-L for the pooled state, T5 for the token states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import comfy.model_management as management
import torch

from xditd.client.comfyui.families.flux1_tokenizers import Flux1Tokenizer, special_tokens
from xditd.client.comfyui.families.text_adapter import EncoderFile, StockEncoder, TextAdapter, TextModel
from xditd.client.comfyui.text import RemoteEncoder, RemoteTextModel
from xditd.client.comfyui.weights import RemoteWeights
from xditd.ipc.errors import BadRequest
from xditd.ipc.name_lists import listed

_LAST_NORM = "encoder.final_layer_norm.weight"
_T5_TABLES = ("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")
_CLIP_PARTS = ("text_model.", "text_projection", "logit_scale")


class Flux1TextModel(RemoteTextModel):
    """FLUX.1's pair of encoders."""

    def __init__(self, parts: Sequence[tuple[RemoteWeights, Mapping[str, str]]], tokenizer: Flux1Tokenizer) -> None:
        """``parts`` are CLIP-L and T5, in this order; see ``TextModel.parts``."""
        super().__init__(parts)
        (clip, _), (t5, _) = parts
        self._clip = RemoteEncoder(clip, special_tokens(tokenizer.clip_l), has_pooled=True)
        self._t5 = RemoteEncoder(t5, special_tokens(tokenizer.t5xxl), has_pooled=False)

    def encode_token_weights(self, tokens: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the output of FLUX.1's tokenizer; returns T5's token states and CLIP's pooled state."""
        states, _ = self._t5.encode_token_weights(tokens["t5xxl"])
        _, pooled = self._clip.encode_token_weights(tokens["l"])
        return states, pooled


class Flux1Text:
    """The family's encoders; see :class:`~xditd.client.comfyui.families.text_adapter.TextAdapter`."""

    title: Final = "FLUX.1 (CLIP-L and T5)"
    clip_type: Final = "flux"
    clip_files: Final = 2

    def stock_encoder(self, tensors: Mapping[str, torch.Tensor]) -> StockEncoder | None:
        """Return how stock ComfyUI holds CLIP-L or T5.

        CLIP-L has the dtype that ComfyUI's flags choose; T5 that of its last norm, unless this takes more bytes.

        Source: ComfyUI 0.33, ``comfy/text_encoders/sd3_clip.py`` (``t5_xxl_detect``), ``comfy/text_encoders/flux.py``.
        """
        device = management.text_encoder_device()
        chosen = management.text_encoder_dtype(device)
        if is_clip(tensors):
            return StockEncoder(chosen, lambda _: False)  # stock has no packed tables in CLIP
        last = next((tensor for name, tensor in tensors.items() if name.endswith(_LAST_NORM)), None)
        if last is None:
            return None
        dtype = management.pick_weight_dtype(last.dtype, chosen, device)
        return StockEncoder(dtype, lambda name: name.endswith(_T5_TABLES))

    def text_model(self, files: Mapping[str, EncoderFile]) -> TextModel:
        """Make FLUX.1's text model from two files, in either order.

        Raises:
            BadCheckpoint: what a file holds is no tokenizer of its encoder.
            BadRequest: not one CLIP-L and one T5, or one with other tokens and no tokenizer.
        """
        found = {is_clip(file.weights.names): file for file in files.values()}
        if len(found) != 2 or len(files) != 2:
            raise BadRequest(
                f"{listed(files, joint=' and ')}: FLUX.1 needs one CLIP-L and one T5 file; choose one of each"
            )
        parts = [(each.weights, module_names(each.weights)) for each in (found[True], found[False])]
        tokenizer = Flux1Tokenizer(found[True], found[False])
        return TextModel(Flux1TextModel(parts, tokenizer), parts, tokenizer)


TEXT_ADAPTER: Final[TextAdapter] = Flux1Text()


def module_names(weights: RemoteWeights) -> dict[str, str]:
    """Return the file's name of each of an encoder's tensors, by ComfyUI's name."""
    found = {}
    for inner in weights.names:
        name = inner.removeprefix("transformer.")
        if is_clip(weights.names):
            found[f"clip_l.transformer.{name if name.startswith(_CLIP_PARTS) else f'text_model.{name}'}"] = inner
        else:
            found[f"t5xxl.transformer.{name}"] = inner
    return found


def is_clip(names: Iterable[str]) -> bool:
    """Return whether an encoder with tensors of these names is CLIP, not T5."""
    return any(name.endswith("embeddings.token_embedding.weight") for name in names)
