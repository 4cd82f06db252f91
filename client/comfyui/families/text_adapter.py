"""Interfaces that a model family implements for its text encoders in the workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from xditd.client.comfyui.weights import RemoteWeights


class TextAdapter(Protocol):
    """The text encoders of one model family."""

    @property
    def title(self) -> str:
        """Names of the models and of their encoders, for users: ``Z-Image (Qwen3 4B)``."""

    @property
    def clip_type(self) -> str:
        """The family's name among the types of ComfyUI's CLIP loaders."""

    @property
    def clip_files(self) -> int:
        """Of how many files its CLIP is made."""

    def stock_encoder(self, tensors: Mapping[str, torch.Tensor]) -> StockEncoder | None:
        """Return how stock ComfyUI holds one file's text encoder; ``None`` if it is none of this family's.

        ``tensors`` may be of any file, also one of another model, or of none.
        """

    def text_model(self, files: Mapping[str, EncoderFile]) -> TextModel:
        """Make the text encoders from files, by label.

        Raises:
            BadRequest: not the files of this family's encoders.
            Unsupported: a relative of them, or a file without the tokenizer that ComfyUI reads in it.
        """


@dataclass(frozen=True)
class StockEncoder:
    """How stock ComfyUI holds a text encoder: ``dtype`` is that of all tensors without a format of their own.

    ``is_table`` returns whether a tensor is a table of which rows are looked up. Tensors named in ``unused`` are in
    some files, and stock computes with none of them; a part of the name is enough.
    """

    dtype: torch.dtype
    is_table: Callable[[str], bool]
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class EncoderFile:
    """A file of a text encoder: its weights, and those of its tensors that are tokenizers, by name."""

    weights: RemoteWeights
    tokenizers: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TextModel:
    """Text encoders that run in the workers, in place of ComfyUI's.

    ``module`` has the methods that ComfyUI's CLIP calls, and a parameter on the meta device for each of their tensors.
    ``parts`` are the encoders' weights, each with ComfyUI's tensor names and the file's name for each of them.
    ``has_branches``: the workers run LoRAs beside their layers; else LoRAs are merged into the weights.
    """

    module: torch.nn.Module
    parts: Sequence[tuple[RemoteWeights, Mapping[str, str]]]
    tokenizer: Any
    has_branches: bool = True
