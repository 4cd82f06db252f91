import pytest

from xditd.gpu_workers.models.shapes import count_blocks, matrix, vote
from xditd.ipc.errors import BadCheckpoint

SHAPES = {"a.weight": (4, 3), "b.weight": (4,), "c.weight": (7, 3), "blocks.0.w": (1,), "blocks.2.w": (1,)}


def test_blocks_are_counted_to_the_highest_number() -> None:
    assert count_blocks("tiny", SHAPES | {"blocks.x.w": (1,), "my.blocks.9.w": (1,)}, "blocks", 3) == 3
    assert count_blocks("tiny", SHAPES, "layers", 3) == 0


def test_too_many_blocks_are_refused() -> None:
    with pytest.raises(BadCheckpoint, match=r"tiny: blocks\.2 exceeds the limit of 2 blocks"):
        count_blocks("tiny", SHAPES, "blocks", 2)


def test_most_candidates_decide() -> None:
    assert vote("tiny", "width", SHAPES, [("a.weight", 0), ("b.weight", 0), ("c.weight", 0), ("none", 0)]) == 4
    assert vote("tiny", "height", SHAPES, [("b.weight", 1)], 5) == 5


def test_a_size_that_no_tensor_shows_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match="tiny: height cannot be read from any tensor"):
        vote("tiny", "height", SHAPES, [("b.weight", 1)])


def test_a_matrix_that_is_none_is_refused() -> None:
    assert matrix("tiny", SHAPES, "a.weight") == (4, 3)
    with pytest.raises(BadCheckpoint, match=r"tiny: b\.weight is \[4\], not a matrix"):
        matrix("tiny", SHAPES, "b.weight")
    with pytest.raises(BadCheckpoint, match="tiny: d is missing"):
        matrix("tiny", SHAPES, "d")
