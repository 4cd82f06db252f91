"""Name a checkpoint that cannot be lent, by its tensors' names, shapes and dtypes, for error messages.

:func:`form_error` recognizes what no family can run (an adapter, several parts in one file, packed weights).
:func:`unsupported_error` also names the model, for callers who know that no family matches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from xditd.ipc.errors import RequestError, Unsupported, UnsupportedDtype
from xditd.ipc.known_models import (
    LORA_KOHYA,
    LORA_PARTS,
    MODELS,
    PACKED_DTYPES,
    PACKED_MARKS,
    SCALES,
    KnownModel,
)
from xditd.ipc.name_lists import listed
from xditd.ipc.tensor_names import split_prefix, tells_nothing

_LORA: Final = "lend it by lend_lora() beside its model; in ComfyUI, use Load LoRA on the MODEL"
_PLAIN: Final = "lend its bfloat16 or float16 file, or one in fp8, int8 (with markers) or GGUF"
_ONE_PART: Final = "lend one part at a time, by kind= or from a file or a state dict that holds nothing else"
_LISTED: Final = "use a whole checkpoint of a model that xditd runs (its README lists them)"
_PARTS: Final = {
    "first_stage_model": "VAE",
    "vae": "VAE",
    "cond_stage_model": "text encoder",
    "clip_l": "CLIP-L",
    "t5xxl": "T5",
    "umt5xxl": "UMT5",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoders": "text encoder",
    "diffusion_model": "transformer or UNet",
    "transformer": "transformer or UNet",
}
"""The part of an all-in-one checkpoint, by a segment of a tensor's prefix; the first match counts."""


class TensorLike(Protocol):
    """A tensor without its bytes; ``dtype`` is torch's own name, such as ``bfloat16``."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def form_error(tensors: Mapping[str, TensorLike], can_run: Sequence[str] = ()) -> RequestError | None:
    """Return the error for an adapter, several models in one file, or packed weights; ``None`` for other tensors.

    ``can_run`` names models for the remedy. The message names the format, the remedy and the first tensors that show
    it; ``names`` has all of them.
    """
    return _adapter_error(tensors) or _parts_error(tensors, can_run) or _packed_error(tensors)


def unsupported_error(tensors: Mapping[str, TensorLike], can_run: Sequence[str] = ()) -> RequestError | None:
    """Return the error for a checkpoint that no family matches: as :func:`form_error`, or with the model's name.

    Call it only after the match has failed: the table also has models that can be run. The remedy is to lend one of
    ``can_run``; without them it says where they are listed.
    """
    return (
        _adapter_error(tensors)
        or _parts_error(tensors, can_run)
        or _model_error(tensors, can_run)
        or (_packed_error(tensors))
    )


def one_of(models: Sequence[str]) -> str:
    """Join alternatives: ``a, b or c``."""
    return " or ".join(part for part in (", ".join(models[:-1]), *models[-1:]) if part)


def _adapter_error(tensors: Mapping[str, TensorLike]) -> RequestError | None:
    adapters = [name for name in tensors if name.startswith(LORA_KOHYA) or LORA_PARTS.search(name)]
    if not adapters:
        return None
    whose = "kohya's" if any(name.startswith(LORA_KOHYA) for name in adapters) else "diffusers'"
    return Unsupported(
        f"a LoRA in {whose} names is no model: {_LORA}; {_format_names(adapters, tensors)}", names=adapters
    )


def _parts_error(tensors: Mapping[str, TensorLike], can_run: Sequence[str]) -> RequestError | None:
    parts = _parts_of(tensors)
    if len(parts) < 2:
        return None
    counts = [f"{part} ({count} tensors)" for part, count in parts.items()]
    name = _describe_model(tensors)
    of = f" of {name}" if name else ""
    which = f" ({one_of(can_run)})" if can_run else ""
    return Unsupported(
        f"an all-in-one checkpoint{of} cannot be lent as a whole: {_ONE_PART}{which}; it holds {listed(counts)}",
        names=counts,
    )


def _model_error(tensors: Mapping[str, TensorLike], can_run: Sequence[str]) -> RequestError | None:
    if _model_of(tensors) is None:
        return None
    remedy = f"lend {one_of(can_run)}" if can_run else _LISTED
    names = sorted(tensors)
    return Unsupported(
        f"{_describe_model(tensors)} cannot be run: {remedy}; {_format_names(names, tensors)}", names=names
    )


def _packed_error(tensors: Mapping[str, TensorLike]) -> RequestError | None:
    kind, packed = _packed_in(tensors)
    if not kind:
        return None
    return UnsupportedDtype(
        f"{_describe_model(tensors)} cannot be run: {_PLAIN}; {_format_names(packed, tensors)}", names=packed
    )


def _is_weight(name: str) -> bool:
    return not name.endswith(".comfy_quant") and not tells_nothing(split_prefix(name)[1])


def _format_names(names: list[str], tensors: Mapping[str, TensorLike]) -> str:
    return f"{len(names)} of {len(tensors)} tensors: {listed(names)}"


def _describe_model(tensors: Mapping[str, TensorLike]) -> str:
    """Name the model and the format of packed weights, as far as they are known; empty if neither is."""
    model = _model_of(tensors)
    kind, _ = _packed_in(tensors)
    name = "" if model is None else model.name
    return f"{name or 'a checkpoint'} with {kind} weights" if kind else name


def _model_of(tensors: Mapping[str, TensorLike]) -> KnownModel | None:
    bare = {split_prefix(name)[1]: each for name, each in tensors.items()}
    for model in MODELS:
        if all(_any_starts_with(bare, mark) for mark in model.marks) and _has_side(bare, model.side):
            return model
    return None


def _any_starts_with(names: Iterable[str], mark: str) -> bool:
    return any(name.startswith(mark) for name in names)


def _has_side(tensors: Mapping[str, TensorLike], side: tuple[str, int, int] | None) -> bool:
    if side is None:
        return True
    name, dimension, size = side
    found = tensors.get(name)
    return found is not None and found.shape[dimension : dimension + 1] == (size,)


def _packed_in(tensors: Mapping[str, TensorLike]) -> tuple[str, list[str]]:
    """Name the format of packed weights, and list them with their dtypes; empty if there are none."""
    packed = [
        f"{name} is {each.dtype}" for name, each in tensors.items() if each.dtype in PACKED_DTYPES and _is_weight(name)
    ]
    for end, kind in PACKED_MARKS:
        if any(name.endswith(end) for name in tensors):
            return kind, packed
    scales = [name for name in tensors if name.endswith(SCALES)]
    dtypes = Counter(each.dtype for name, each in tensors.items() if _is_weight(name))
    found = max((dtype for dtype in PACKED_DTYPES if dtypes[dtype]), key=lambda dtype: dtypes[dtype], default=None)
    if found is None:
        return ("scaled", scales) if scales else ("", [])
    return ("scaled " if scales else "") + PACKED_DTYPES[found], packed


def _parts_of(tensors: Iterable[str]) -> dict[str, int]:
    """Count the tensors of each part of an all-in-one checkpoint, by prefix."""
    counts: Counter[str] = Counter()
    for name in tensors:
        prefix, bare = split_prefix(name)
        segments = prefix.split(".")
        part = "text encoder" if bare.startswith("conditioner.") else None
        part = part or next((what for segment, what in _PARTS.items() if segment in segments), None)
        if part is not None and _is_weight(name):
            counts[part] += 1
    return dict(counts)
