"""Arguments of modules that run as their class, and results: every kind there and back, in the caller's own objects."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from xditd.client.io_places import IoPlaces
from xditd.client.jobs.class_arguments import ClassArgumentWriter
from xditd.client.jobs.class_results import ClassResultReader, NotReturned
from xditd.client.jobs.held_tensors import HeldStore, HeldTensor
from xditd.ipc.arguments import Argument, Given, Held, InIo, ListOf, MapOf, Named, ObjectOf, Opaque, OutputOf, Values
from xditd.ipc.errors import BadRequest, Internal, Unsupported, UnsupportedDtype

CPU = torch.device("cpu")


class Fixture:
    """A writer and a reader that share the tensors in place of a block, and a store of held tensors."""

    def __init__(self) -> None:
        self.writer = ClassArgumentWriter(IoPlaces())
        self.released: list[str] = []
        self.store = HeldStore(lambda held: torch.full(held.shape, 3.0), self.released.extend)
        self.reader = ClassResultReader(self._read, CPU, self.store)

    def write(self, value: Any) -> Argument:
        return self.writer.write({"x": value})["x"]

    def _read(self, leaf: InIo, _: torch.device) -> torch.Tensor:
        return next(tensor for other, tensor in self.writer.inputs if other == leaf.place)

    def held(self, held_id: str = "h1") -> Held:
        return Held(held_id=held_id, dtype="float32", shape=(2,))


@pytest.fixture
def both() -> Any:
    made = Fixture()
    yield made
    made.store.close()


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        0.5,
        "text",
        math.inf,
        -math.inf,
        torch.float16,
        AttentionBackendName.NATIVE,
        DynamicLayer,
        [1, (2, None)],
        {"a": {1: "b"}},
        {1, 2},
    ],
)
def test_plain_values_come_back_as_they_were(both: Fixture, value: Any) -> None:
    found = both.reader.value(both.write(value))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 50),
        torch.full((2,), math.nan),
        torch.full((100,), -math.inf),
        torch.zeros(0, 4),
        torch.randn(2, dtype=torch.complex64),
        torch.randn(100, dtype=torch.float64),
    ],
    ids=["matrix", "nan", "inf", "empty", "complex", "double"],
)
def test_tensors_come_back_with_their_bits(both: Fixture, tensor: torch.Tensor) -> None:
    node = both.write(tensor)
    if isinstance(node, Values):
        assert (node.shape, node.values) == (tuple(tensor.shape), tuple(tensor.flatten().tolist()))
    else:
        found = both.reader.value(node)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.nan_to_num(), tensor.nan_to_num())


def test_small_tensors_are_in_the_message_and_those_without_dimensions_too(both: Fixture) -> None:
    assert both.write(torch.tensor(7)) == Values(dtype="int64", shape=(), values=(7,))
    assert isinstance(both.write(torch.tensor(math.nan)), InIo)


def test_the_order_in_memory_is_sent(both: Fixture) -> None:
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    node = both.write(image)
    assert isinstance(node, InIo)
    assert node.order is not None
    _, sent = both.writer.inputs[0]
    assert sent.is_contiguous()
    assert torch.equal(sent.permute(node.order), image)
    assert sent.permute(node.order).stride() == image.stride()
    for plain in (torch.randn(8, 16), torch.randn(1, 100).expand(5, 100), torch.randn(20, 20)[:, ::2]):
        found = both.write(plain)
        assert isinstance(found, InIo)
        assert found.order is None


def test_cpu_tensors_for_a_module_on_a_gpu_are_marked(both: Fixture) -> None:
    both.writer = ClassArgumentWriter(IoPlaces(), is_on_gpu=True)
    for tensor in (torch.zeros(1), torch.zeros(100)):
        node = both.write(tensor)
        assert isinstance(node, (Values, InIo))
        assert node.on_host


class Pair(NamedTuple):
    one: int
    other: int


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (len, "x: builtin_function_or_method cannot be sent"),
        (Pair(1, 2), "x: a Pair with names; give a tuple without names"),
        ({"f": [lambda: 0]}, r"x.f\[0\]: function cannot be sent"),
        (torch.nn.Linear(1, 1), "x: Linear cannot be sent"),
        (endless(), "arguments may be nested 12 levels deep at most"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_path(both: Fixture, value: Any, why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        both.write(value)


def test_a_tensor_that_needs_a_gradient_is_refused(both: Fixture) -> None:
    tensor = torch.zeros(1, requires_grad=True)
    with pytest.raises(BadRequest, match=r"x: it requires a gradient.*call under torch.no_grad"):
        both.write(tensor)
    with torch.no_grad():
        both.write(tensor)


def test_a_cache_gets_its_new_state_in_the_callers_own_objects(both: Fixture) -> None:
    cache = Flux2KVCache(1, 1)
    layer = cache.double_block_caches[0]
    node = both.write(cache)
    assert isinstance(node, ObjectOf)
    assert node.class_name == "diffusers.models.transformers.transformer_flux2:Flux2KVCache"
    layers = node.attributes["double_block_caches"]
    assert isinstance(layers, ListOf)
    filled = ListOf(items=(ObjectOf(class_name=layers.items[0].class_name, attributes={"k_ref": both.held()}),))
    new = ObjectOf(class_name=node.class_name, attributes={**node.attributes, "double_block_caches": filled})
    assert both.reader.update(new, cache) is cache
    assert cache.double_block_caches[0] is layer
    assert isinstance(layer.k_ref, HeldTensor)
    first = layer.k_ref
    both.reader.update(new, cache)
    assert layer.k_ref is first  # the same tensor in the workers
    again = both.write(cache)
    assert isinstance(again, ObjectOf)
    assert again.attributes["double_block_caches"] == filled


def test_a_held_tensor_is_read_when_it_is_used_and_released_when_it_is_dropped(both: Fixture, wait_until: Any) -> None:
    tensor = both.reader.value(both.held())
    assert (tensor.shape, tensor.dtype) == ((2,), torch.float32)
    assert both.write(tensor) == both.held()
    assert torch.equal(tensor + 1, torch.full((2,), 4.0))
    assert "in the workers" in repr(tensor)
    assert both.released == []
    del tensor
    wait_until(lambda: both.released == ["h1"])


def test_results_are_of_the_callers_own_classes(both: Fixture) -> None:
    name = "diffusers.models.modeling_outputs:Transformer2DModelOutput"
    found = both.reader.value(OutputOf(class_name=name, items={"sample": both.write(torch.zeros(100))}))
    assert type(found) is Transformer2DModelOutput
    assert found[0].shape == (100,)
    assert both.reader.value(MapOf(items={"a": Named(name="torch.int8")})) == {"a": torch.int8}


@pytest.mark.parametrize("name", ["os:system", "diffusers.models.modeling_outputs:Missing", "torch:hub"])
def test_a_result_of_another_class_is_refused(both: Fixture, name: str) -> None:
    for node in (OutputOf(class_name=name, items={}), ObjectOf(class_name=name, attributes={})):
        with pytest.raises(Unsupported, match=f"class {name}: "):
            both.reader.value(node)


def test_what_was_not_returned_says_so_when_it_is_used(both: Fixture) -> None:
    found = both.reader.value(Opaque(text="torch._C:Generator"))
    assert isinstance(found, NotReturned)
    assert repr(found) == "<NotReturned torch._C:Generator>"
    with pytest.raises(Unsupported, match=r"^shape of a result: the torch._C:Generator was not sent"):
        _ = found.shape


class _Own(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.ones(2, device="meta"), "on the meta device"),
        (torch.ones(2).to_sparse(), "torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (torch.ones(2).as_subclass(_Own), "test_class_arguments._Own"),
    ],
)
def test_tensors_without_plain_memory_are_named(both: Fixture, tensor: torch.Tensor, text: str) -> None:
    with pytest.raises(BadRequest, match=rf"x\.a: this tensor cannot be sent.*{text}"):
        both.write({"a": tensor})


def test_a_quantised_tensor_is_refused_by_its_dtype(both: Fixture) -> None:
    with pytest.raises(UnsupportedDtype, match="x: dtype qint8 cannot be sent"):
        both.write(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))


def test_a_tensor_inside_of_a_transform_of_torch_is_refused(both: Fixture) -> None:
    with pytest.raises(BadRequest, match="x: this tensor cannot be sent, it is inside of vmap"):
        torch.func.vmap(both.write)(torch.ones(3, 2))


@pytest.mark.parametrize("use", [bool, len, list, lambda part: part[0], lambda part: part(), lambda part: part.shape])
def test_every_use_of_what_was_not_returned_is_refused(both: Fixture, use: Any) -> None:
    part = both.reader.value(Opaque(text="own:Thing"))
    with pytest.raises(Unsupported, match="the own:Thing was not sent by the workers"):
        use(part)


def test_object_of_another_class_replaces_the_one_before(both: Fixture) -> None:
    """As a forward that changes a layer of a cache to one of another class."""
    before = DynamicLayer()
    holder = {"layer": before}
    name = "transformers.cache_utils:DynamicSlidingWindowLayer"
    node = MapOf(items={"layer": ObjectOf(class_name=name, attributes={"sliding_window": 4})})
    assert both.reader.update(node, holder) is holder
    assert type(holder["layer"]) is DynamicSlidingWindowLayer
    assert type(before) is DynamicLayer


def test_results_that_are_arguments_are_the_callers_own_objects(both: Fixture) -> None:
    cache = Flux2KVCache(1, 1)
    part = {"cache": cache, "more": ({"a": [cache]}, torch.zeros(2))}
    reader = ClassResultReader(both._read, CPU, both.store, [{}, part])
    assert reader.value(Given(part=1, name="cache")) is cache
    assert reader.value(Given(part=1, name="cache", path=(0,))) is next(iter(vars(cache).values()))
    assert reader.value(ListOf(items=(Given(part=1, name="more", path=(0, 0, 0)),)))[0] is cache
    assert reader.value(Given(part=1, name="more", path=(1,))) is part["more"][1]
    for wrong in (Given(part=2, name="x"), Given(part=1, name="x"), Given(part=1, name="more", path=(7,))):
        with pytest.raises(Internal, match="an argument that the call does not have"):
            reader.value(wrong)


def test_classes_of_the_program_are_named(both: Fixture) -> None:
    with pytest.raises(BadRequest, match=r"x: class .*:Fixture cannot be sent to the workers"):
        both.write(Fixture)
