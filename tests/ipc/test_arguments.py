"""Argument trees: order and paths of their nodes, and limits."""

from __future__ import annotations

import pytest

from xditd.ipc import limits
from xditd.ipc.arguments import (
    Argument,
    InIo,
    Kept,
    ListOf,
    MapOf,
    Repeated,
    Rows,
    TupleOf,
    Values,
    tensors,
    walk,
)

PLACE = InIo(offset_bytes=0, dtype="float32", shape=(2, 3))
KEPT = Kept(kept_id="k1", dtype="float32", shape=(2, 3))
VALUES = Values(dtype="float32", shape=(1,), values=(0.5,))
TREE: dict[str, Argument] = {
    "x": ListOf(items=(PLACE, TupleOf(items=(1, KEPT)))),
    "t": VALUES,
    "more": MapOf(items={"rows": Rows(parts=(Repeated(tensor=KEPT, times=2), Repeated(tensor=PLACE)))}),
}


def nested(levels: int) -> Argument:
    found: Argument = 1
    for _ in range(levels):
        found = ListOf(items=(found,))
    return found


def test_a_tree_is_walked_from_the_top_in_the_order_of_its_arguments() -> None:
    assert [path for path, _ in walk(TREE)] == ["x", "x[0]", "x[1]", "x[1][0]", "x[1][1]", "t", "more", "more.rows"]


def test_tensors_are_found_wherever_they_are() -> None:
    assert list(tensors(TREE)) == [
        ("x[0]", PLACE),
        ("x[1][1]", KEPT),
        ("t", VALUES),
        ("more.rows.rows[0]", KEPT),
        ("more.rows.rows[1]", PLACE),
    ]


def test_a_tree_may_be_as_deep_and_large_as_the_limits_say_and_no_more() -> None:
    list(walk({"x": nested(limits.MAX_ARGUMENT_DEPTH - 1)}))
    with pytest.raises(ValueError, match="is nested deeper than 12 levels"):
        list(walk({"x": nested(limits.MAX_ARGUMENT_DEPTH)}))
    list(walk({"x": ListOf(items=(1,) * (limits.MAX_ARGUMENTS - 1))}))
    with pytest.raises(ValueError, match="more than 1024 arguments in one tree"):
        list(walk({"x": ListOf(items=(1,) * limits.MAX_ARGUMENTS)}))
