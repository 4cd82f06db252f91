"""Choose how the ranks of a group share the forwards of one call: whole rows, or the tokens of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from xditd.gpu_workers.parallel.row_gather import Share, assign

EXCHANGE_COST: Final = 1.1
"""How much longer ranks take that share tokens, for their exchanges, than ranks that each run their own rows."""


def prefers_tokens(shares: Sequence[Share], ranks: int) -> bool:
    """Return whether ranks that share the tokens of all parts have less to do than the busiest rank has by rows.

    Rows that divide evenly need no exchange while they are computed, so they win.
    """
    loads = [0] * ranks
    for piece in assign(shares, ranks):
        loads[piece.rank] += len(piece.rows)
    return max(loads) > EXCHANGE_COST * sum(share.rows for share in shares) / ranks
