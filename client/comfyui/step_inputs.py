"""What a step's forward has to know on the host, in one wait for the GPU; and conditioning that the workers keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import Kept

KNOWN_ROWS = 8
"""Rows of conditioning that are remembered: positive and negative of a few prompts."""

Texts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Step:
    """The conditioning of the last step, with what is kept of each of its rows."""

    texts: Texts
    kept: list[Kept]


class StepInputs:
    """Reads the inputs of one step after the other. For one thread at a time, like ComfyUI's execution."""

    def __init__(self) -> None:
        self._known: list[tuple[Texts, Kept]] = []
        self._last: _Step | None = None

    def read(
        self, rows: int, numbers: Mapping[str, torch.Tensor], texts: Texts, keep: Callable[[Texts], Kept]
    ) -> tuple[dict[str, list[float]], list[Kept]]:
        """Read a step's numbers, and what is kept of each of its rows of texts; equal rows share it.

        ``numbers`` are (rows,), ``texts`` (rows, ...). ``keep`` makes what is kept of a row
        that is not known yet. Conditioning is compared by content: ComfyUI gathers the tensors anew at each step, and
        other nodes may replace them in between. The host waits once for the GPU: every wait is a part of each step's
        cost.
        """
        last = self._last
        can_be_last = last is not None and _are_alike(last.texts, texts)
        read = list(numbers.values())
        if last is not None and can_be_last:
            read += [(last.texts[name] == tensor).all().reshape(1) for name, tensor in texts.items()]
        # One tensor of the widest of their dtypes, which holds each of these numbers exactly.
        flat: list[float] = torch.cat(read).tolist()
        found = {name: flat[at * rows : (at + 1) * rows] for at, name in enumerate(numbers)}
        if last is None or not can_be_last or not all(flat[len(numbers) * rows :]):
            each_row = ({name: each[row : row + 1] for name, each in texts.items()} for row in range(rows))
            last = self._last = _Step(_copied(texts), [self._kept(row, keep) for row in each_row])
        return found, last.kept

    def _kept(self, texts: Texts, keep: Callable[[Texts], Kept]) -> Kept:
        for at, (known, kept) in enumerate(self._known):
            if _are_alike(known, texts) and all(torch.equal(known[name], texts[name]) for name in texts):
                self._known.insert(0, self._known.pop(at))
                return kept
        fresh = keep(texts)
        self._known.insert(0, (_copied(texts), fresh))
        del self._known[KNOWN_ROWS:]
        return fresh


def _copied(texts: Texts) -> Texts:
    return {name: tensor.clone() for name, tensor in texts.items()}


def _are_alike(one: Texts, other: Texts) -> bool:
    return one.keys() == other.keys() and all(_is_alike(one[name], other[name]) for name in one)


def _is_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
