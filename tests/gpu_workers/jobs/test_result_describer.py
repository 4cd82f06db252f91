"""Results and arguments are described with all that they hold; what cannot be described says so."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from transformers.cache_utils import DynamicCache, DynamicLayer

from xditd.gpu_workers.jobs.held import HeldTensors
from xditd.gpu_workers.jobs.result_describer import ResultDescriber
from xditd.gpu_workers.parallel.streams import Stream
from xditd.ipc.arguments import (
    Given,
    Held,
    InIo,
    ListOf,
    MapOf,
    Named,
    ObjectOf,
    Opaque,
    PairsOf,
    SetOf,
    TupleOf,
    Values,
)
from xditd.ipc.errors import Internal
from xditd.ipc.processes import ProcessIdentity


class Named2(NamedTuple):
    first: int


@pytest.fixture
def describer() -> ResultDescriber:
    job: Any = type("Job", (), {"parts": ()})
    return ResultDescriber(HeldTensors(), ProcessIdentity(pid=1, start_ticks=1), job, [])


BACKEND = "diffusers.models.attention_dispatch:AttentionBackendName.NATIVE"


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ({"a", "b"}, SetOf(items=("a", "b"))),
        (frozenset({1, 2}), SetOf(items=(1, 2))),
        (AttentionBackendName.NATIVE, Named(name=BACKEND)),
        ([1, (2.5, None)], ListOf(items=(1, TupleOf(items=(2.5, None))))),
        ({"a": True}, MapOf(items={"a": True})),
        ({1: "x"}, PairsOf(items=((1, "x"),))),
        (DynamicLayer, Named(name="class:transformers.cache_utils:DynamicLayer")),
        (HeldTensors, Opaque(text="class xditd.gpu_workers.jobs.held:HeldTensors")),
        (torch.bfloat16, Named(name="torch.bfloat16")),
    ],
)
def test_values_are_described(describer: ResultDescriber, value: Any, described: Any) -> None:
    assert describer.describe(value, lambda _: None) == described


def test_what_cannot_be_described_says_so(describer: ResultDescriber) -> None:
    assert isinstance(describer.describe(Named2(1), lambda _: None), Opaque)
    assert isinstance(describer.describe(object(), lambda _: None), Opaque)


def test_a_share_of_a_cache_is_described_as_the_whole() -> None:
    held, client = HeldTensors(), ProcessIdentity(pid=1, start_ticks=1)
    job: Any = type("Job", (), {"parts": ()})
    cache = object.__new__(DynamicCache)
    cache.table = held.shares.take(torch.zeros(2, 5, 3), 1, Stream((3, 2)), 1)
    described = ResultDescriber(held, client, job, []).describe(cache, lambda _: None)
    assert isinstance(described, ObjectOf)
    assert described.attributes["table"] == Held(held_id="h1", dtype="float32", shape=(2, 5, 3))
    assert held.find(client, "h1", "table").shape == (2, 2, 3)


PLACE = InIo(offset_bytes=0, dtype="float32", shape=(2,))
LAYER = ObjectOf(class_name="transformers.cache_utils:DynamicLayer", attributes={"is_initialized": False})
CACHE = ObjectOf(class_name="transformers.cache_utils:DynamicCache", attributes={"layers": ListOf(items=(LAYER,))})


def describer_of(node: Any, value: Any) -> ResultDescriber:
    part: Any = type("Part", (), {"arguments": {"x": node}})
    job: Any = type("Job", (), {"parts": (part,)})
    return ResultDescriber(HeldTensors(), ProcessIdentity(pid=1, start_ticks=1), job, [{"x": value}])


def cache_of_a_layer() -> Any:
    cache = object.__new__(DynamicCache)
    cache.layers = [object.__new__(DynamicLayer)]
    cache.layers[0].is_initialized = False
    return cache


def test_arguments_among_the_results_are_references() -> None:
    cache = cache_of_a_layer()
    describer = describer_of(CACHE, cache)
    found = describer.describe({"a": cache, "b": cache.layers[0]}, lambda _: None)
    assert found == MapOf(items={"a": Given(part=0, name="x"), "b": Given(part=0, name="x", path=(0, 0))})
    assert describer.describe_state(cache, lambda _: None) == CACHE
    # The client has another object at its place, and no reference to it.
    layer = cache.layers[0]
    cache.layers[0] = object.__new__(DynamicLayer)
    assert describer.describe(layer, lambda _: None) == LAYER
    cache.layers.clear()
    assert describer.describe(layer, lambda _: None) == LAYER


def test_tensors_among_the_results_are_references_where_they_cannot_change() -> None:
    tensor = torch.zeros(2)
    assert describer_of(PLACE, tensor).describe(tensor, lambda _: "new") == Given(part=0, name="x")
    small = Values(dtype="float32", shape=(2,), values=(0.0, 0.0))
    assert describer_of(small, tensor).describe(tensor, lambda _: "new") == Given(part=0, name="x")
    kept = InIo(offset_bytes=0, dtype="float32", shape=(2,), kept_id="k")  # the client's own object is another one
    assert describer_of(kept, tensor).describe(tensor, lambda _: "new") == "new"
    holder = object.__new__(DynamicLayer)
    holder.keys = tensor
    of_object = ObjectOf(class_name=LAYER.class_name, attributes={"keys": PLACE})
    assert describer_of(of_object, holder).describe(tensor, lambda _: "new") == "new"


def test_values_that_differ_from_their_description_are_named() -> None:
    cache = cache_of_a_layer()
    cache.layers.clear()
    with pytest.raises(Internal, match=r"argument x: a list at \[0\] has 0 values, of 1 that the client describes"):
        describer_of(CACHE, cache)
