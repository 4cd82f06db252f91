"""Run ComfyUI's own text models, but their innermost module, which runs in the workers.

ComfyUI's class of a text model splits a prompt into tokens, masks padding, chooses layers, crops templates and applies
weights of words. It looks up embeddings, and gives these to its innermost module, ``transformer``. Here a token's
embedding is its id, so that :class:`RemoteTransformer` gets the ids and masks that ComfyUI made, and encodes them in
the workers.

Source: ComfyUI 0.33, ``comfy/sd1_clip.py`` (``SDClipModel``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from xditd.client.comfyui.families.text_adapter import EncoderFile, TextModel
from xditd.client.comfyui.text import RemoteTextModel, encode_ids
from xditd.client.comfyui.weights import RemoteWeights
from xditd.ipc.errors import Unsupported

Part = tuple[RemoteWeights, Mapping[str, str]]

_CPU: Final = torch.device("cpu")


class TokenIds:
    """Replaces the table of tokens: looks up the ids themselves, (rows, tokens, 1), in float32, which holds them."""

    weight: Final = torch.empty(0)

    def __call__(self, ids: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return ids.unsqueeze(-1).to(torch.float32)


class RemoteTransformer(torch.nn.Module):
    """Replaces the innermost module of ComfyUI's text model, as it has its interface; encodes in the workers.

    A family whose prompts have images adds ``preprocess_embed``, as ComfyUI's modules do, and :meth:`images`.
    """

    def __init__(self, weights: RemoteWeights, layers: int) -> None:
        """``layers`` is how many the encoder has."""
        super().__init__()
        self._weights = weights
        self.num_layers = layers

    def get_input_embeddings(self) -> TokenIds:
        return TokenIds()

    def forward(
        self,
        _: None,
        attention_mask: torch.Tensor | None,
        *,
        embeds: torch.Tensor,
        intermediate_output: int | Sequence[int] | None,
        final_layer_norm_intermediate: bool,
        embeds_info: Sequence[Mapping[str, Any]] = (),
        **__: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Encode the ids in ``embeds`` (rows, tokens, 1).

        Returns the states after the final norm (rows, tokens, width) and ``None``, or else ``None`` and the states of
        the layer ``intermediate_output``, or of several (rows, layers, tokens, width).
        """
        ids = embeds[..., 0].round().to(_CPU, torch.int64)
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.to(_CPU, torch.int64)
        more: dict[str, Any] = {"mask": mask, "images": self.images(ids, embeds_info)}
        if intermediate_output is None:
            return encode_ids(self._weights, ids, **more), None
        if isinstance(intermediate_output, int):
            layer = intermediate_output + (1 if intermediate_output >= 0 else self.num_layers + 1)
            if final_layer_norm_intermediate:
                if layer != self.num_layers:
                    raise Unsupported(
                        f"CLIP Set Last Layer: {layer - self.num_layers - 1}, but XDiT's CLIP gives the last layer "
                        "only; set it to -1"
                    )
                return None, encode_ids(self._weights, ids, **more)
            return None, encode_ids(self._weights, ids, layers=(layer,), **more)
        layers = tuple(sorted(set(intermediate_output)))
        states = encode_ids(self._weights, ids, layers=layers, **more)
        return None, states.reshape(*ids.shape, len(layers), -1).movedim(2, 1)

    def images(self, ids: torch.Tensor, embeds_info: Sequence[Mapping[str, Any]]) -> Mapping[str, torch.Tensor] | None:
        """Return the arguments of images for the workers; ``embeds_info`` are ComfyUI's records of their places."""
        return None


class StockTextModel(RemoteTextModel):
    """ComfyUI's text model of one encoder, whose innermost module runs in the workers."""

    _stock: Any

    def __init__(self, part: Part, stock: Any, transformer: RemoteTransformer) -> None:
        """``stock`` is an instance of ComfyUI's class, on the meta device; ``part``: see ``TextModel.parts``."""
        super().__init__([part])
        encoder = getattr(stock, stock.clip)
        encoder.transformer = transformer
        encoder.num_layers = transformer.num_layers
        self.__dict__["_stock"] = stock  # no child: its tensors are no parameters of this model
        self._label = part[0].label

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        if options.get("execution_device") is not None:
            options = {**options, "execution_device": _CPU}  # where ids and masks are made
        self._stock.set_clip_options(options)

    def reset_clip_options(self) -> None:
        self._stock.reset_clip_options()

    def encode_token_weights(self, tokens: Mapping[str, Any], **more: Any) -> Any:
        """Encode the output of the tokenizer; returns what ComfyUI's class does."""
        for sections in tokens.values():
            for section in sections:
                if any(is_embedding(token[0]) for token in section):
                    raise Unsupported(
                        f"{self._label}: the prompt names a textual inversion embedding; XDiT's CLIP takes plain text "
                        "and images, use a stock CLIP loader for it"
                    )
        return self._stock.encode_token_weights(tokens, **more)


def is_embedding(token: Any) -> bool:
    """Return whether a token of ComfyUI's tokenizers is an embedding from a file."""
    return isinstance(token, torch.Tensor) or (isinstance(token, Mapping) and token.get("type") == "embedding")


def stock_text_model(
    file: EncoderFile,
    stock: Any,
    tokenizer: Any,
    layers: int,
    *,
    transformer: type[RemoteTransformer] = RemoteTransformer,
    has_branches: bool = False,
) -> TextModel:
    """Make the text model of one file from ``stock``, an instance of ComfyUI's class on the meta device."""
    names = {f"{stock.clip}.transformer.{name}": name for name in file.weights.names}
    part = (file.weights, names)
    module = StockTextModel(part, stock, transformer(file.weights, layers))
    return TextModel(module, [part], tokenizer, has_branches)


def count_layers(names: Sequence[str], prefix: str) -> int:
    """Return how many numbers follow ``prefix`` in names of tensors."""
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d{{1,4}})\.")
    return len({int(found[1]) for name in names if (found := pattern.match(name))})
