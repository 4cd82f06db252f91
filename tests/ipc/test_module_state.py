"""States of modules: the round trip, and states beyond the limits."""

from __future__ import annotations

import zlib

import pytest

from xditd.ipc import limits, module_state
from xditd.ipc.arguments import Argument, ListOf, MapOf, Named, ObjectOf, Opaque, PairsOf, SetOf, Special, TupleOf
from xditd.ipc.errors import BadRequest
from xditd.ipc.module_state import ModuleState, SubmoduleState


def state_with(value: Argument) -> ModuleState:
    return ModuleState(submodules={"": SubmoduleState(class_name="m:C", attributes={"x": value})})


def nested(levels: int) -> Argument:
    value: Argument = 1
    for _ in range(levels - 1):
        value = ListOf(items=(value,))
    return value


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**63),
        0.1,
        "text",
        ListOf(items=(1, TupleOf(items=()))),
        MapOf(items={"k": Special(value="nan")}),
        PairsOf(items=((1, Named(name="torch.bfloat16")),)),
        SetOf(items=("a",)),
        ObjectOf(class_name="m:C", attributes={"y": Opaque(text="function")}),
        nested(limits.MAX_ARGUMENT_DEPTH),
    ],
)
def test_a_state_comes_back_as_it_was(value: Argument) -> None:
    state = state_with(value)
    assert module_state.decode(module_state.encode(state, "m")) == state


def test_a_state_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_MODULE_STATE_BYTES", 20)
    with pytest.raises(BadRequest, match=r"^m: the attributes of its 1 submodules take \d+ bytes, \d+ compressed"):
        module_state.encode(state_with("text"), "m")


BOMB = zlib.compress(b" " * (limits.MAX_PLAIN_MODULE_STATE_BYTES + 1))


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (b"", "is cut off after 0 bytes"),
        (zlib.compress(b"{}" * 99)[:-5], "is cut off after"),
        (b"no zlib", "cannot be read: Error -3"),
        (BOMB, f"takes more than {limits.MAX_PLAIN_MODULE_STATE_BYTES} bytes"),
        (zlib.compress(b"{}"), "missing required field `submodules`"),
        (zlib.compress(b'{"submodules": {}, "more": 1}'), "unknown field `more`"),
        (zlib.compress(b"[" * 100_000), "cannot be read"),
        (module_state.encode(state_with(nested(limits.MAX_ARGUMENT_DEPTH + 1)), "m"), "x of the module is nested"),
    ],
    ids=["empty", "cut", "no zlib", "bomb", "field", "unknown", "arrays", "deep"],
)
def test_bytes_of_no_state_are_refused(packed: bytes, why: str) -> None:
    with pytest.raises(BadRequest, match=r"state of the module|attribute x of the module") as caught:
        module_state.decode(packed)
    assert why in str(caught.value)
