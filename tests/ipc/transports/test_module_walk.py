"""Walks of modules: attributes of every kind, shared submodules, hooks, and what cannot be described."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import AttnProcessor2_0

from xditd.ipc import limits
from xditd.ipc.arguments import (
    LentTensor,
    ListOf,
    MapOf,
    Named,
    ObjectOf,
    Opaque,
    PairsOf,
    SetOf,
    Special,
    TupleOf,
)
from xditd.ipc.errors import BadRequest
from xditd.ipc.transports.module_walk import describe_constant, method_signature, walk_module

TEXT = "torch.nn.modules.linear:Linear"


def described(value: Any) -> Any:
    module = torch.nn.Module().eval()
    module.__dict__["x"] = value
    return walk_module(module)[0].submodules[""].attributes.get("x", "nothing")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (0.5, 0.5),
        ("text", "text"),
        (math.inf, Special(value="inf")),
        (-math.inf, Special(value="-inf")),
        (math.nan, Special(value="nan")),
        (torch.bfloat16, Named(name="torch.bfloat16")),
        (
            AttentionBackendName.NATIVE,
            Named(name="diffusers.models.attention_dispatch:AttentionBackendName.NATIVE"),
        ),
        ([1, (2,)], ListOf(items=(1, TupleOf(items=(2,))))),
        ({"a": [1]}, MapOf(items={"a": ListOf(items=(1,))})),
        ({1: "a"}, PairsOf(items=((1, "a"),))),
        ({"b", "a"}, SetOf(items=("a", "b"))),
        (torch.zeros(1), LentTensor(name="x")),
        ({"t": [torch.zeros(1)]}, MapOf(items={"t": ListOf(items=(LentTensor(name="x.t[0]"),))})),
        (
            AttnProcessor2_0(),
            ObjectOf(class_name="diffusers.models.attention_processor:AttnProcessor2_0", attributes={}),
        ),
        (torch.nn.functional.silu, Opaque(text="function torch.nn.functional:silu")),
        (torch.nn.Linear, Opaque(text=f"class {TEXT}")),
        (torch.nn.Linear(1, 1), Opaque(text=f"{TEXT} object outside the module")),
        (
            functools.partial(torch.nn.functional.gelu, approximate="tanh"),
            Opaque(text="partial of function None:gelu with () {'approximate': 'tanh'}"),
        ),
    ],
)
def test_attributes_of_every_kind(value: Any, expected: Any) -> None:
    found = described(value)
    if isinstance(expected, Opaque):
        assert isinstance(found, Opaque)
        assert found.text.startswith(expected.text.partition(":")[0].partition(" None")[0])
    else:
        assert found == expected


class Plain:
    """An object of a package whose objects cannot be made."""

    def __init__(self, number: int) -> None:
        self.number = number


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Plain(1), Plain(2)),
        (numpy.zeros(3), numpy.ones(3)),
        (numpy.zeros(3), numpy.zeros(3, dtype="float32")),
        (list(range(2000)), list(range(1, 2001))),
        ("a" * 600, "a" * 599 + "b"),
        (2**70, 2**71),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (lambda x: x, functools.partial(lambda x: x, 1)),
    ],
)
def test_values_that_cannot_be_sent_are_equal_only_if_their_contents_are(one: Any, other: Any) -> None:
    assert isinstance(described(one), Opaque)
    assert described(one) == described(one)
    assert described(one) != described(other)


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_an_attribute_that_holds_itself_ends() -> None:
    cyclic: list[Any] = [1]
    cyclic.append(cyclic)
    assert described(cyclic) == ListOf(items=(1, Opaque(text="builtins:list object that holds itself")))


def test_what_is_too_deep_or_too_large_to_be_described_is_refused_by_path() -> None:
    described(deep(8))
    with pytest.raises(BadRequest, match=r"^x(\[0\]){8}: attributes that are nested deeper than 8 levels"):
        described(deep(9))
    tensors = [torch.zeros(1)] * (limits.MAX_ARGUMENTS + 1)
    with pytest.raises(BadRequest, match=r"^x: 1025 items with tensors or objects among them cannot be described"):
        described(tensors)


def test_a_shared_submodule_is_described_once() -> None:
    shared = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module = torch.nn.ModuleDict({"a": shared, "b": shared}).eval()
    module.first = module["a"]
    state, tensors = walk_module(module)
    assert list(state.submodules) == ["", "a", "a.0"]
    assert state.same == {"b": "a", "b.0": "a.0", "first": "a", "first.0": "a.0"}
    assert list(tensors) == ["a.0.weight", "a.0.bias"]


def test_parameters_buffers_and_what_is_registered_as_none() -> None:
    module = torch.nn.Module().eval()
    module.register_parameter("p", torch.nn.Parameter(torch.zeros(1)))
    module.register_parameter("no_p", None)
    module.register_buffer("b", torch.zeros(1))
    module.register_buffer("unsaved", torch.zeros(1), persistent=False)
    module.register_buffer("no_b", None)
    module.register_module("no_m", None)
    found = walk_module(module)[0].submodules[""]
    assert (found.parameters, found.buffers, found.not_saved) == (("p",), ("b", "unsaved"), ("unsaved",))
    assert (found.empty_parameters, found.empty_buffers, found.empty_modules) == (("no_p",), ("no_b",), ("no_m",))
    assert found.attributes == {}


def hook(*_: object) -> None:
    """A hook of this test."""


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_submodules_are_named_and_those_of_the_module_run_at_the_caller(register: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1)).eval()
    getattr(module, register)(hook)
    before, _ = walk_module(module, {"forward"})  # called in this process, which sends the calls to the workers
    assert all(
        not each.attributes.keys() & {"_forward_hooks", "_forward_pre_hooks"} for each in before.submodules.values()
    )
    getattr(module[0], register)(hook)
    name = register.replace("register", "") + "s"
    text = ListOf(items=(Opaque(text=f"function {__name__}:hook"),))
    assert walk_module(module, {"forward"})[0].submodules["0"].attributes[name] == text
    assert walk_module(module)[0].submodules[""].attributes[name] == text


def test_training_and_a_replaced_forward_are_seen() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert walk_module(module)[0].submodules["0"].attributes["training"] is True
    module.eval()
    assert "training" not in walk_module(module)[0].submodules["0"].attributes
    module.forward = hook
    module[0].forward = hook
    state, _ = walk_module(module, replaced=["forward"])
    assert "forward" not in state.submodules[""].attributes
    assert state.submodules["0"].attributes["forward"] == Opaque(text=f"function {__name__}:hook")


def test_an_attribute_that_is_a_submodule_is_its_path() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1)).eval()
    module.__dict__["last"] = [module[0]]
    found = walk_module(module)[0].submodules[""].attributes["last"]
    assert found == ListOf(items=(Named(name="submodule:0"),))


def test_an_enumeration_of_another_package_cannot_be_sent() -> None:
    import enum

    class Own(enum.IntEnum):
        ONE = 1

    assert isinstance(describe_constant(Own.ONE), Opaque)


def test_the_signature_behind_diffusers_forward_hook_is_found() -> None:
    from diffusers import AutoencoderKL

    assert list(method_signature(AutoencoderKL.decode).parameters)[:2] == ["self", "z"]
    assert list(method_signature(AutoencoderKL.forward).parameters)[:2] == ["self", "sample"]
