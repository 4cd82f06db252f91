"""FLUX.1's tokenizers: ComfyUI's own, or those in the files of encoders whose tables of tokens are others.

Stock ComfyUI loads CLIP-L and T5-XXL with its own tables only. A model of this architecture with other tokens has a
tokenizer in each encoder's file: the tensor ``tokenizer_json``, as ComfyUI's files of other models have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import comfy.sd1_clip
import comfy.text_encoders.flux

from xditd.client.comfyui.families.language_model_text import embeddings_folders
from xditd.ipc.errors import BadCheckpoint, BadRequest

if TYPE_CHECKING:
    import torch

    from xditd.client.comfyui.families.text_adapter import EncoderFile

TENSOR: Final = "tokenizer_json"
"""The bytes of a ``tokenizer.json`` of the library tokenizers."""

_TABLES: Final = {
    "clip_l": ("embeddings.token_embedding.weight",),
    "t5xxl": ("shared.weight", "embed_tokens.weight"),
}
_STOCK_ROWS: Final = {"clip_l": 49_408, "t5xxl": 32_128}
"""Source: ComfyUI 0.33, ``comfy/sd1_clip_config.json``, ``comfy/text_encoders/t5_config_xxl.json``."""
_SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "clip_l": {},
    "t5xxl": {
        "pad_with_end": False,
        "has_start_token": False,
        "pad_to_max_length": False,
        "max_length": 99_999_999,
        "min_length": 256,
    },
}
"""How ComfyUI splits and pads, whatever the tokens. Source: ComfyUI 0.33, ``comfy/text_encoders/flux.py``."""


class FileTokenizer:
    """A tokenizer of a file, with the methods that ComfyUI's ``SDTokenizer`` calls."""

    def __init__(self, data: torch.Tensor, label: str, added: int) -> None:
        """``data`` is the tensor of :data:`TENSOR`; ``added`` is how many tokens start and end a text.

        Raises:
            BadCheckpoint: no tokenizer, or one that starts and ends a text otherwise.
        """
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(bytes(data.tolist()).decode())
        except Exception as error:  # the library raises bare exceptions
            raise BadCheckpoint(f"{label}: {TENSOR} cannot be read as a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        found = self("")["input_ids"]
        if len(found) != added:
            raise BadCheckpoint(
                f"{label}: the tokenizer in {TENSOR} makes {len(found)} tokens of an empty text, but this encoder's "
                f"texts have {added} beside their words"
            )

    @classmethod
    def from_pretrained(cls, data: torch.Tensor, label: str, added: int) -> FileTokenizer:
        return cls(data, label, added)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text).ids}

    def get_vocab(self) -> dict[str, int]:
        found: dict[str, int] = self._tokenizer.get_vocab()
        return found

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        found: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return found


class Flux1Tokenizer(comfy.text_encoders.flux.FluxTokenizer):
    """ComfyUI's pair of tokenizers, each replaced by that of its encoder's file if the encoder needs that."""

    def __init__(self, clip: EncoderFile, t5: EncoderFile) -> None:
        """Choose the tokenizers of both encoders.

        Raises:
            BadCheckpoint: what a file holds is no tokenizer of such an encoder.
            BadRequest: an encoder lacks tokens of ComfyUI's tokenizer, and its file holds no other.
        """
        super().__init__(embedding_directory=embeddings_folders())
        self._own: dict[str, torch.Tensor] = {}
        for name, file in (("clip_l", clip), ("t5xxl", t5)):
            rows = _rows(file, name)
            if rows in (None, _STOCK_ROWS[name]):
                continue
            if TENSOR in file.tokenizers:
                self._own[f"{name}.{TENSOR}"] = file.tokenizers[TENSOR]
                setattr(self, name, _from_file(file, name))
                if name == "clip_l":
                    _check_end(file.weights.label, self.clip_l.end_token, rows)
            elif rows <= max(getattr(self, name).inv_vocab):
                raise BadRequest(
                    f"{file.weights.label}: it has {rows} tokens, and FLUX.1's tokenizer in ComfyUI makes "
                    f"{len(getattr(self, name).inv_vocab)}; its file needs the tensor {TENSOR}, a tokenizer of its own"
                )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the files' tokenizers, for nodes that save, below the names of their encoders."""
        return dict(self._own)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the tokens that start, end and pad the texts of one of ComfyUI's tokenizers, as its encoders take them."""
    found = {"start": tokenizer.start_token, "end": tokenizer.end_token, "pad": tokenizer.pad_token}
    return {name: token for name, token in found.items() if token is not None}


def _check_end(label: str, end: int, rows: int) -> None:
    """Check that the pooled state is that of the token that ends a text: the workers take a vocabulary's last one.

    Raises:
        BadCheckpoint: it is another one.
    """
    last = min(rows, _STOCK_ROWS["clip_l"]) - 1
    if end != last:
        raise BadCheckpoint(
            f"{label}: the tokenizer in {TENSOR} ends a text with token {end}, but the pooled state is that of token "
            f"{last}"
        )


def _rows(file: EncoderFile, name: str) -> int | None:
    """Return how many tokens an encoder has."""
    shapes = file.weights.shapes
    return next((int(each.shape[0]) for found, each in shapes.items() if found.endswith(_TABLES[name])), None)


def _from_file(file: EncoderFile, name: str) -> Any:
    settings = _SETTINGS[name]
    return comfy.sd1_clip.SDTokenizer(
        file.tokenizers[TENSOR],
        embedding_directory=embeddings_folders(),
        embedding_key=name,
        tokenizer_class=FileTokenizer,
        tokenizer_args={"label": file.weights.label, "added": 1 + settings.get("has_start_token", True)},
        **settings,
    )
