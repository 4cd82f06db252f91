"""Rows of a batch that the workers keep, as one argument."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xditd.client.jobs.arguments import RowsOf

if TYPE_CHECKING:
    from xditd.client.jobs.arguments import KeptTensor


def joined(kept: Sequence[KeptTensor]) -> KeptTensor | RowsOf:
    """Join one row each along dimension 0: a row that follows itself crosses as a number of times."""
    runs = [(row, len(list(same))) for row, same in itertools.groupby(kept, key=lambda each: each)]
    return runs[0][0] if len(runs) == 1 and runs[0][1] == 1 else RowsOf(runs)
