"""Encoding text: how encoders are told by their tensors' names, what a job hands in, and what it hands back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xditd.client.tensor_text import tensor_text
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import Manifest

if TYPE_CHECKING:
    import torch

_MARKS: Final = ("text_model.encoder.layers.", "encoder.block.0.layer.", "embeddings.token_embedding.weight")
_EMBEDDINGS: Final = ("embeddings.token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight")


@dataclass(frozen=True, eq=False, repr=False)
class TextEncoding:
    """What a text encoder makes of tokens, in float32, on their device; both belong to the caller.

    ``hidden_states`` (batch, tokens, width) are the last layer after the final norm. ``pooled`` (batch, width), if it
    was asked for, is the state at the first end-of-text token, not projected, as FLUX.1 takes it.
    """

    hidden_states: torch.Tensor
    pooled: torch.Tensor | None

    def __repr__(self) -> str:
        pooled = "not pooled" if self.pooled is None else f"pooled {tensor_text(self.pooled)}"
        return f"<TextEncoding hidden_states {tensor_text(self.hidden_states)}, {pooled}>"


def is_text_encoder(names: Collection[str]) -> bool:
    """Say whether these are the tensors of a CLIP text model or of a T5 encoder, under any prefix."""
    return any(mark in name for name in names for mark in _MARKS)


def width_of(manifest: Manifest) -> int | None:
    """Read the width of an encoder's states from its token embedding; ``None`` if the manifest has none."""
    for spec in manifest.tensors:
        if spec.name.endswith(_EMBEDDINGS) and len(spec.shape) == 2:
            return spec.shape[1]
    return None


def check_token_ids(token_ids: torch.Tensor | Sequence[Sequence[int]]) -> torch.Tensor:
    """Read token ids as (batch, tokens), int64. Which ids there are, the encoder knows.

    Raises:
        BadRequest: rows of different lengths, another shape, or numbers that are not whole.
    """
    import torch

    if not isinstance(token_ids, torch.Tensor):
        lengths = {len(row) if isinstance(row, Sequence) else -1 for row in token_ids}
        if len(lengths) > 1:
            raise BadRequest(f"token_ids: rows of {listed(sorted(lengths))} tokens; pad them to one length")
        try:
            token_ids = torch.tensor(token_ids)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise BadRequest("token_ids: rows of whole numbers are needed, such as [[49406, 320, 49407]]") from None
    if token_ids.dtype not in (torch.int64, torch.int32):
        found = str(token_ids.dtype).removeprefix("torch.")
        raise BadRequest(f"token_ids: dtype {found} cannot be used; give whole numbers, int64 or int32")
    if token_ids.ndim != 2 or 0 in token_ids.shape:
        raise BadRequest(f"token_ids: shape {tuple(token_ids.shape)} instead of (batch, tokens), both at least 1")
    batch, tokens = token_ids.shape
    if batch > limits.MAX_BATCH or tokens > limits.MAX_TEXT_TOKENS:
        raise BadRequest(
            f"token_ids: shape {(batch, tokens)}, at most {(limits.MAX_BATCH, limits.MAX_TEXT_TOKENS)}; split it"
        )
    return token_ids.to(torch.int64)
