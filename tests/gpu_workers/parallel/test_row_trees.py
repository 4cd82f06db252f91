"""The rows of arguments and results: which values have them, taking some, joining them again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from xditd.gpu_workers.parallel.row_trees import (
    Leaf,
    batch_of,
    build,
    copy_tree,
    join,
    leaves_of,
    structure_of,
    structure_of_rows,
    take_rows,
    tensors_of,
)

BATCH = 3


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def same(a: Any, b: Any) -> bool:
    return (
        type(a) is type(b)
        and structure_of(a, 0) == structure_of(b, 0)
        and all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))
    )


def test_the_batch_is_that_of_the_first_tensor_or_list_of_tensors() -> None:
    assert batch_of({"scale": 2.0, "x": numbers(3, 5), "y": numbers(4, 5)}) == 3
    assert batch_of({"x": [numbers(4, 1), numbers(4, 2)], "t": numbers(2)}) == 2
    assert batch_of({"x": {"image": numbers(5, 1)}}) == 5
    assert batch_of({"t": torch.tensor(1.0), "ids": numbers(7, 3)}) == 7
    assert batch_of({"scale": 2.0, "shapes": [[1, 2]]}) == 0


def test_rows_are_taken_of_tensors_and_lists_of_the_length_of_the_batch() -> None:
    given = {
        "x": numbers(BATCH, 2),
        "positions": numbers(4, 2),
        "time": torch.tensor(0.5),
        "texts": [numbers(7, 2), numbers(5, 2), numbers(3, 2)],  # one of them has as many tokens as images
        "blocks": [numbers(BATCH, 1), numbers(BATCH, 2), numbers(BATCH, 3)],
        "shapes": [[(1, 2)], [(1, 4)], [(1, 6)]],
        "lengths": [7, 5, 3],
        "more": ({"pooled": numbers(BATCH, 4)}, None),
    }
    taken = take_rows(given, BATCH, slice(1, 3))
    assert taken["x"].tolist() == given["x"][1:3].tolist()
    assert taken["x"].untyped_storage().data_ptr() == given["x"].untyped_storage().data_ptr()
    assert taken["positions"] is given["positions"]
    assert taken["time"] is given["time"]
    assert [each.shape[0] for each in taken["texts"]] == [5, 3]
    assert [tuple(each.shape) for each in taken["blocks"]] == [(2, 1), (2, 2), (2, 3)]
    assert taken["shapes"] == [[(1, 4)], [(1, 6)]]
    assert taken["lengths"] == [7, 5, 3]
    assert taken["more"][0]["pooled"].shape == (2, 4)


def test_a_copy_has_the_same_tensors_in_new_lists_and_maps() -> None:
    given = {"options": {"scale": 1.0}, "blocks": [numbers(2)]}
    copied = copy_tree(given)
    copied["options"].pop("scale")
    copied["blocks"].append(None)
    assert given["options"] == {"scale": 1.0}
    assert len(given["blocks"]) == 1
    assert copied["blocks"][0] is given["blocks"][0]


@pytest.mark.parametrize(
    "whole",
    [
        numbers(BATCH, 2),
        (numbers(BATCH, 2), torch.tensor(4.0), None),
        [numbers(1, 2), numbers(2, 2), numbers(4, 2)],
        {"sample": numbers(BATCH, 1), "skips": (numbers(BATCH, 2), numbers(BATCH, 3)), "scale": 0.5},
        OrderedDict(sample=numbers(BATCH)),
        Transformer2DModelOutput(sample=numbers(BATCH, 2)),
        Transformer2DModelOutput(sample=[numbers(1, 2), numbers(2, 2), numbers(4, 2)]),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("cut", [1, 2])
def test_rows_that_were_taken_are_joined_to_the_whole(whole: Any, cut: int) -> None:
    structure = structure_of(whole, BATCH)
    assert structure is not None
    pieces = []
    for rows in (range(cut), range(cut, BATCH)):
        piece = take_rows(whole, BATCH, slice(rows.start, rows.stop))
        part = structure_of_rows(structure, rows)
        assert structure_of(piece, 0) == part
        leaves, tensors = list(leaves_of(part)), list(tensors_of(piece))
        assert [leaf.shape for leaf in leaves] == [tuple(each.shape) for each in tensors]
        pieces.append(build(part, iter(tensors)))
        assert same(pieces[-1], piece)
    assert same(join(structure, pieces), whole)


def test_structures_tell_values_types_and_shapes_apart() -> None:
    assert structure_of([1, True], 0) != structure_of([1, 1], 0)
    assert structure_of([1], 0) != structure_of([1.0], 0)
    assert structure_of([numbers(2)], 0) != structure_of((numbers(2),), 0)
    assert structure_of({"a": numbers(2)}, 0) != structure_of({"b": numbers(2)}, 0)
    assert structure_of(numbers(2), 0) != structure_of(numbers(2).half(), 0)
    assert structure_of(numbers(2), 0) == Leaf((2,), torch.float32, "cpu", has_rows=True)


def test_a_result_with_objects_has_no_structure() -> None:
    @dataclass
    class Cache:
        key: torch.Tensor

    assert structure_of((numbers(2), Cache(numbers(2))), 2) is None
    assert structure_of({"kinds": {1, 2}}, 2) is None
