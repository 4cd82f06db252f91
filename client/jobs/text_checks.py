"""Check the texts of ``Client.encode_text`` before anything is sent: token ids, masks, layers and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xditd.client.jobs.checks import FLOAT_DTYPES, axes_text, check_same_size, check_whole, shape_text
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import TextEncoderFacts
from xditd.ipc.name_lists import listed

if TYPE_CHECKING:
    import torch


def check_token_ids(token_ids: torch.Tensor | Sequence[Sequence[int]]) -> torch.Tensor:
    """Convert token ids to (batch, tokens), int64. The workers check that the encoder has such ids.

    Raises:
        BadRequest: rows of different lengths, another shape, or numbers that are not integers.
    """
    import torch

    if not isinstance(token_ids, torch.Tensor):
        if not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes):
            raise BadRequest(
                f"token_ids: {token_ids!r:.100} is of type {type(token_ids).__name__}; give rows of whole numbers, "
                "such as [[49406, 320, 49407]]"
            )
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


def check_mask(mask: torch.Tensor | Sequence[Sequence[int]], token_ids: torch.Tensor) -> torch.Tensor:
    """Convert a mask of padding to the shape, device and dtype of ``token_ids``: 1 for tokens, 0 for padding.

    Raises:
        BadRequest: another shape, or other values.
    """
    import torch

    try:
        found = mask if isinstance(mask, torch.Tensor) else torch.tensor(mask)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise BadRequest("mask: rows of 0 and 1 are needed, as many as token_ids") from None
    if found.shape != token_ids.shape:
        raise BadRequest(f"mask: shape {tuple(found.shape)}, but token_ids have {tuple(token_ids.shape)}")
    if not ((found == 0) | (found == 1)).all():
        raise BadRequest("mask: use 1 for tokens and 0 for padding")
    return found.to(token_ids.device, torch.int64)


def check_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """Check numbers of layers; the workers know how many there are.

    Raises:
        BadRequest: no sequence of whole numbers from 0, or too many.
    """
    if not isinstance(layers, Sequence) or isinstance(layers, str) or len(layers) > limits.MAX_TEXT_LAYERS:
        raise BadRequest(
            f"layers: {layers!r} is not a sequence of up to {limits.MAX_TEXT_LAYERS} numbers, such as (9, 18, 27)"
        )
    for number, each in enumerate(layers):
        check_whole(f"layers[{number}]", each, 0, limits.MAX_LAYER)
    return tuple(layers)


def check_images(images: Mapping[str, Any], facts: TextEncoderFacts) -> dict[str, torch.Tensor]:
    """Check the arguments of images by the encoder's facts; those of whole numbers become int64.

    Raises:
        BadRequest: the encoder takes none; or one is unknown, missing, no tensor or of another shape.
    """
    import torch

    if not isinstance(images, Mapping):
        raise BadRequest(f"images: a dict of tensors by name is needed, not {type(images).__name__}")
    if not images:
        return {}
    known = {each.name: each for each in facts.images}
    if not known:
        raise BadRequest("images: this encoder takes texts alone; leave them out, or lend it with its vision tower")
    takes = ", ".join(f"{name} {axes_text(each)}" for name, each in known.items())
    unknown = [str(name) for name in images if name not in known]
    if unknown:
        raise BadRequest(f"images: {listed(unknown)} is not known here; this encoder takes {takes}")
    missing = [name for name, each in known.items() if each.is_needed and images.get(name) is None]
    if missing:
        raise BadRequest(f"images: lacks {listed(missing)}; this encoder takes {takes}")
    checked: dict[str, torch.Tensor] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for name, each in known.items():
        value = images.get(name)
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise BadRequest(f"images.{name}: a torch tensor {axes_text(each)} is needed, not {type(value).__name__}")
        if value.dtype in (torch.int64, torch.int32):
            value = value.to(torch.int64)
        elif str(value.dtype) not in FLOAT_DTYPES:
            found = str(value.dtype).removeprefix("torch.")
            raise BadRequest(f"images.{name}: dtype {found} cannot be used; give what the encoder's processor makes")
        is_fitting = value.ndim == len(each.shape) and 0 not in value.shape
        pairs = list(zip(each.shape, value.shape, strict=False))
        if not is_fitting or any(isinstance(side, int) and side != count for side, count in pairs):
            raise BadRequest(f"images.{name}: shape {shape_text(value)} instead of {axes_text(each)}")
        for side, count in pairs:
            if isinstance(side, str):
                check_same_size(side, count, f"images.{name}", sizes)
        checked[name] = value
    return checked
