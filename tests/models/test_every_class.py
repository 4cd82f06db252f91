"""Every transformer class of diffusers, run by a worker as in this process."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from class_entries import ENTRIES
from class_entry import ClassEntry, Random
from diffusers import ModelMixin
from refusals import REFUSED_CALLS

from xditd.client import BadRequest, Client

LONG = {"WanAnimate2Transformer3DModel-kv_cached"}
"""Compiles its attention for a minute. Of the others, every third is tested in each test run."""

pytestmark = pytest.mark.usefixtures("as_many_threads_as_the_worker")


def transformer_classes() -> set[str]:
    """Return the names of the transformer classes that the installed diffusers exports."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if not name.startswith("_")}
    return {
        name
        for name, kind in found.items()
        if inspect.isclass(kind)
        and issubclass(kind, ModelMixin)
        and kind.__module__.startswith("diffusers.models.transformers.")
    }


def test_every_class_has_an_entry() -> None:
    assert transformer_classes() == {entry.name for entry in ENTRIES.values()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=pytest.mark.long if key in LONG or number % 3 else (), id=key)
        for number, (key, entry) in enumerate(ENTRIES.items())
    ],
)
@torch.no_grad()
def test_one_worker_gives_the_bits_of_the_class(client: Client, entry: ClassEntry) -> None:
    model = entry.build()
    ours, theirs = entry.arguments(Random(1)), entry.arguments(Random(1))
    with client.lend(model, as_class=True) as loan:
        if entry.key in REFUSED_CALLS:
            with pytest.raises(BadRequest, match=REFUSED_CALLS[entry.key].says):
                client.call(loan, ours)
            return
        found = client.call(loan, ours)
    expected = model(**theirs)
    assert_same(found, expected, "result")
    # Caches among the arguments have the same contents; a second reading of a worker's tensor needs its loan no more.
    assert_same(ours, theirs, "arguments")


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Compare two trees: classes, structure, and every bit."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), where
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), where
        copy = found.clone()
        assert torch.equal(copy, expected) or torch.equal(copy.nan_to_num(), expected.nan_to_num()), where
    elif isinstance(expected, Mapping):
        assert type(found) is type(expected), where
        assert list(found) == list(expected), where
        for key, each in expected.items():
            assert_same(found[key], each, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected), where
        assert len(found) == len(expected), where
        for number, each in enumerate(expected):
            assert_same(found[number], each, f"{where}[{number}]")
    elif hasattr(expected, "__dict__"):
        assert type(found) is type(expected), where
        assert_same(vars(found), vars(expected), where)
    else:
        assert found == expected or (found != found and expected != expected), where  # NaN
