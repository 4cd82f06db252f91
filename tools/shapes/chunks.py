"""Chunks of training scenes with the tokens of their sentences, made by processes beside the training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random
from typing import Any, Final

import numpy
import torch

from shapes.draw import encode
from shapes.text_tokens import tokens
from shapes.words import sample_request

Chunk = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Scenes as :func:`~shapes.draw.encode` writes them, CLIP's tokens and T5's tokens, int32."""

_PREFETCHED: Final = 4
"""Chunks that each process makes ahead."""


class SceneChunks(torch.utils.data.Dataset[tuple[numpy.ndarray, ...]]):
    """Chunks by number: the same number gives the same chunk, whoever makes it.

    Their tokens are int16. Arrays go through a pipe as they are, where each tensor would be a file in shared memory
    whose descriptor the training has to ask a busy process for.
    """

    def __init__(self, seed: int, first: int, chunks: int, size: int) -> None:
        self._seed, self._first, self._chunks, self._size = seed, first, chunks, size

    def __len__(self) -> int:
        return self._chunks

    def __getitem__(self, at: int) -> tuple[numpy.ndarray, ...]:
        if at >= self._chunks:
            raise IndexError(at)
        rng = Random(f"{self._seed} {self._first + at}")
        requests = [sample_request(rng) for _ in range(self._size)]
        both = tokens([each.text for each in requests])
        return encode([each.scene for each in requests]).numpy(), *(each.to(torch.int16).numpy() for each in both)


def chunks(seed: int, first: int, size: int, workers: int) -> Iterator[Chunk]:
    """Yield chunks from number ``first`` on without end, made by ``workers`` processes (0: by this one)."""
    tokens([""])  # makes the tokenizers, which the processes then have
    loader: Any = torch.utils.data.DataLoader(
        SceneChunks(seed, first, 1 << 30, size),
        batch_size=None,
        sampler=range(1 << 30),
        num_workers=workers,
        prefetch_factor=_PREFETCHED if workers else None,
        worker_init_fn=_leave_group if workers else None,
        collate_fn=_as_it_is,
    )
    for scenes, clip, t5 in loader:
        yield torch.from_numpy(scenes), torch.from_numpy(clip).int(), torch.from_numpy(t5).int()


def _as_it_is(made: Any) -> Any:
    return made


def _leave_group(_worker: int) -> None:
    """Leave the process group of the training, which gets Ctrl-C of a terminal and SIGTERM of timeout(1) as a whole.

    The training then ends its workers, by SIGTERM too.
    """
    os.setpgid(0, 0)
