"""How parts and their rows are shared over ranks; the transfer itself is tested with ranks in jobs/test_module_rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from xditd.gpu_workers.parallel.row_gather import Piece, Share, assign, pieces_of


def loads(pieces: Sequence[Piece], ranks: int) -> list[int]:
    return [sum(len(piece.rows) for piece in pieces if piece.rank == rank) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("rows", "ranks", "found"),
    [
        (2, 2, [(0, 1), (1, 2)]),
        (3, 2, [(0, 2), (2, 3)]),
        (2, 4, [(0, 1), (1, 2)]),
        (6, 4, [(0, 2), (2, 4), (4, 6)]),
        (1, 2, [(0, 1)]),
        (0, 2, []),
    ],
)
def test_pieces_have_all_rows_once(rows: int, ranks: int, found: list[tuple[int, int]]) -> None:
    assert [(each.start, each.stop) for each in pieces_of(rows, ranks)] == found


def test_parts_go_to_ranks_whole_if_that_takes_no_longer() -> None:
    assert assign([Share(0, 2, True), Share(1, 2, True)], 2) == [Piece(0, range(2), 0), Piece(1, range(2), 1)]
    assert assign([Share(4, 1, False), Share(7, 1, False)], 4) == [Piece(4, range(1), 0), Piece(7, range(1), 1)]


def test_the_rows_of_one_part_go_to_all_ranks() -> None:
    assert assign([Share(0, 3, True)], 2) == [Piece(0, range(2), 0), Piece(0, range(2, 3), 1)]
    assert assign([Share(0, 3, False)], 2) == [Piece(0, range(3), 0)]


@pytest.mark.parametrize(
    ("shares", "ranks", "longest"),
    [
        ([Share(0, 2, True), Share(1, 2, True), Share(2, 2, True)], 2, 3),
        ([Share(0, 1, False), Share(1, 1, False), Share(2, 1, False)], 2, 2),
        ([Share(0, 9, False), Share(1, 7, False)], 2, 9),
        ([Share(0, 4, False), Share(1, 4, True)], 2, 4),
        ([Share(0, 8, True)], 8, 1),
    ],
)
def test_the_longest_rank_has_as_few_rows_as_can_be(shares: list[Share], ranks: int, longest: int) -> None:
    pieces = assign(shares, ranks)
    assert max(loads(pieces, ranks)) == longest
    assert pieces == sorted(pieces, key=lambda each: (each.part, each.rows.start))
    for share in shares:
        rows = [row for piece in pieces if piece.part == share.part for row in piece.rows]
        assert rows == list(range(share.rows))
