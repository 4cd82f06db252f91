"""Calls of classes with a token plan: those of the entries, other numbers of rows, and other numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cache_calls import CACHE_CALLS
from class_entries import ENTRIES
from class_entry import ClassEntry, Random
from image_calls import IMAGE_CALLS
from token_counts import BUILDERS, COUNTS
from video_calls import VIDEO_CALLS

MOST_USED = (
    "ChromaTransformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "Krea2Transformer2DModel",
    "LTX2VideoTransformer3DModel",
    "MiniMaxH3Transformer3DModel",
    "QwenImage21Transformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
)
"""The classes that each test run covers; the others are for long runs."""

WITH_CACHE = {
    "Flux2Transformer2DModel-kv_extract",
    "Flux2Transformer2DModel-kv_cached",
    "GlmImageTransformer2DModel",
    "GlmImageTransformer2DModel-kv_read",
    "GlmImageTransformer2DModel-kv_write",
    "QwenImage21Transformer2DModel",
    "QwenImage21Transformer2DModel-kv_cached",
    "SanaWMLTX2RefinerTransformer3DModel",
}
"""Entries with a cache of keys and values, which also run without it."""

WITHOUT_CACHE = "without a cache"
"""The name of the call of such an entry without its cache, which a plan does cover."""

PLAN_ENTRIES = ENTRIES | {entry.key: entry for entry in (*IMAGE_CALLS, *VIDEO_CALLS, *CACHE_CALLS)}
"""Further calls beside those of the entries, for what plans declare and no entry gives."""


@dataclass
class Case:
    """A call of a model, and what the model's own forward returns on one rank."""

    name: str
    model: torch.nn.Module
    arguments: Callable[[], dict[str, Any]]
    expected: tuple[torch.Tensor, ...]

    def call(self) -> tuple[Any, list[Any]]:
        """Return the result, and what the call leaves in its caches."""
        return call(self.model, self.arguments())


def call(model: torch.nn.Module, arguments: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Call a model; return the result, and what the call leaves in its caches."""
    return model(**arguments), [each for each in arguments.values() if "Cache" in type(each).__name__]


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a result: an output class, a tuple, a list; of an object also numbers of tokens."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, int):
        yield torch.tensor([value, 1])
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(vars(value))


@torch.no_grad()
def cases_of(entry: ClassEntry, *, with_counts: bool = True) -> list[Case]:
    """Return the calls of an entry: its own; with other rows; without a cache; of a first entry, other counts."""
    model = entry.build()

    def case(name: str, arguments: Callable[[], dict[str, Any]]) -> Case:
        return Case(name, model, arguments, tuple(tensors_of(call(model, arguments()))))

    def own() -> dict[str, Any]:
        return entry.arguments(Random(1))

    found = [case("entry", own)]
    found += _with_other_rows(found[0])
    if entry.key in WITH_CACHE:
        found += _without_cache(found[0])
    builder = BUILDERS.get(entry.key)
    if builder is not None and with_counts:
        for text, image in COUNTS:
            for rows in (1, 2):

                def build(rows: int = rows, text: int = text, image: int = image) -> dict[str, Any]:
                    return builder(Random(1), rows, text, image)

                found.append(case(f"{rows} rows of {text} and {image} tokens", build))
    return found


def _with_other_rows(whole: Case) -> list[Case]:
    """Return the call with its first row alone or, of one row, with that row twice; none where this cannot be had.

    Which arguments have rows is not known. What has the result's number of rows may: where the class's result for
    the changed arguments is not that of the row, they are something else, and there is no such call.
    """
    rows = whole.expected[0].shape[0]
    if any(each.ndim == 0 or each.shape[0] != rows for each in whole.expected):
        return []
    change = partial(_first_of, rows) if rows > 1 else _twice
    try:
        result = tuple(tensors_of(call(whole.model, change(whole.arguments()))))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return []
    is_row = len(result) == len(whole.expected) and all(
        new.shape[0] == (1 if rows > 1 else 2)
        and new.shape[1:] == old.shape[1:]
        and torch.allclose(new[:1], old[:1], rtol=1e-4, atol=1e-4)
        for new, old in zip(result, whole.expected, strict=True)
    )
    name = "first row" if rows > 1 else "row twice"
    return [Case(name, whole.model, lambda: change(whole.arguments()), result)] if is_row else []


def _without_cache(whole: Case) -> list[Case]:
    """Return the call without its cache; none where the class needs it."""

    def arguments() -> dict[str, Any]:
        return {name: each for name, each in whole.arguments().items() if not name.startswith(("kv_cache", "num_ref"))}

    try:
        result = tuple(tensors_of(call(whole.model, arguments())))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return []
    return [Case(WITHOUT_CACHE, whole.model, arguments, result)]


def _first_of(rows: int, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:1] if value.ndim and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {name: _first_of(rows, each) for name, each in value.items()}
    if isinstance(value, list):
        # A list of tensors with rows, or a list with an item for each row.
        if len(value) == rows and not any(
            isinstance(each, torch.Tensor) and each.shape[:1] == (rows,) for each in value
        ):
            return value[:1]
        return [_first_of(rows, each) for each in value]
    return value


def _twice(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value]) if value.ndim and value.shape[0] == 1 else value
    if isinstance(value, dict):
        return {name: _twice(each) for name, each in value.items()}
    if isinstance(value, list):
        if len(value) == 1 and not (isinstance(value[0], torch.Tensor) and value[0].shape[:1] == (1,)):
            return value * 2
        return [_twice(each) for each in value]
    return value
