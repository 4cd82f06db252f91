"""Modulations (shift, scale, gate) of FLUX.1's blocks, for many timesteps at once if these are known.

Their weights are more than a quarter of the model. One kernel reads them once for all vectors, with the same bits for a
vector alone and among others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F

from xditd.gpu_workers.families.flux1.timesteps import embed_time

MAX_VECTORS: Final = 32
"""Most vectors of one kernel launch; the modulations of each take 2 MB at FLUX.1's size."""

_KEPT_RUNS: Final = 2
"""For the forwards of a prompt and of a negative prompt of another length."""


class Times(NamedTuple):
    """The sigma of a forward, the same for all its rows, and the sigmas of all forwards, as the model takes them."""

    now: float
    guidance: float | None
    sigmas: tuple[float, ...]


class Modulations(NamedTuple):
    """Modulations for some vectors, one for each sample of each step.

    ``conditioning`` is (vectors, hidden), ``double`` (vectors, blocks, 2, 6 * hidden) for text and image, ``single``
    (vectors, blocks, 3 * hidden).
    """

    conditioning: torch.Tensor
    double: torch.Tensor
    single: torch.Tensor

    def rows(self, start: int, count: int) -> Modulations:
        return Modulations(*(part[start : start + count] for part in self))


Matrices = Callable[[torch.Tensor, int], torch.Tensor]
"""Multiplies vectors (vectors, hidden) with a matrix for each block (or stream of one), of so many rows, and adds the
biases: (vectors, matrices, rows)."""

Embed = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Embeds the sigmas of some steps, each (samples,), with guidance and pooled text; (steps * samples, hidden)."""


@dataclass(frozen=True)
class _CachedRun:
    """Modulations of some sigmas, for the same guidance, pooled text and rounding."""

    pooled: torch.Tensor
    """Referenced so that no other tensor gets its address."""
    guidance: float | None
    variant: str
    sigmas: tuple[float, ...]
    made: Modulations

    def is_for(self, pooled: torch.Tensor, guidance: float | None, variant: str) -> bool:
        mine = self.pooled
        is_same_memory = (mine.data_ptr(), mine.shape, mine.stride()) == (
            pooled.data_ptr(),
            pooled.shape,
            pooled.stride(),
        )
        return is_same_memory and (self.guidance, self.variant) == (guidance, variant)


class Modulator:
    """Computes and caches the modulations of one model; ``embed`` is its ``time_text_embed``."""

    def __init__(self, embed: Any, width: int) -> None:
        self._embed = embed
        self._width = width
        self._double: Matrices | None = None
        self._single: Matrices | None = None
        self._runs: list[_CachedRun] = []

    @property
    def kept(self) -> int:
        """How many vectors' modulations are cached."""
        return sum(len(run.made.single) for run in self._runs)

    def plug(self, double: Matrices, single: Matrices) -> None:
        """Use these weights until :meth:`unplug` or the next plug."""
        self.unplug()
        self._double, self._single = double, single

    def unplug(self) -> None:
        """Drop the weights and the cache."""
        self._double = self._single = None
        self._runs.clear()

    def forget(self) -> None:
        """Drop the cache: the weights, or what is added to their products, have changed."""
        self._runs.clear()

    def __call__(
        self,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        pooled: torch.Tensor,
        dtype: torch.dtype,
        variant: str,
        times: Times | None = None,
    ) -> Modulations:
        """Return the modulations of one forward, a row for each sample.

        With ``times``, those of later sigmas are computed, too, and cached for the next forwards.
        """

        def embed(sigmas: Sequence[torch.Tensor]) -> torch.Tensor:
            # One step at a time: embedders round a batch differently.
            return torch.cat([embed_time(self._embed, each, guidance, pooled, dtype, variant) for each in sigmas])

        if times is not None:
            return self._of_schedule(times, embed, timestep, pooled, variant)
        return self._make(embed([timestep]))

    def _of_schedule(
        self, times: Times, embed: Embed, timestep: torch.Tensor, pooled: torch.Tensor, variant: str
    ) -> Modulations:
        samples, key = pooled.shape[0], (pooled, times.guidance, variant)
        run = next((each for each in self._runs if each.is_for(*key)), None)
        if run is None or times.now not in run.sigmas:
            # One sigma alone at the first step, since the GPU would wait while the host embeds many; also for a sigma
            # that is not in the schedule.
            is_first = run is None or times.now not in times.sigmas
            sigmas = (times.now,) if is_first else _window(times, max(1, MAX_VECTORS // samples))
            given = [timestep if sigma == times.now else torch.full_like(timestep, sigma) for sigma in sigmas]
            made = self._make(embed(given))
            if run is not None and is_first:
                return made
            run = _CachedRun(*key, sigmas, made)
        self._runs = [run, *(each for each in self._runs if not each.is_for(*key))][:_KEPT_RUNS]
        return run.made.rows(run.sigmas.index(times.now) * samples, samples)

    def _make(self, conditioning: torch.Tensor) -> Modulations:
        assert self._double is not None
        assert self._single is not None
        vectors = F.silu(conditioning)
        double = self._double(vectors, 6 * self._width)
        single = self._single(vectors, 3 * self._width)
        return Modulations(conditioning, double.unflatten(1, (-1, 2)), single)


def _window(times: Times, most: int) -> tuple[float, ...]:
    """Return all sigmas of the schedule, or ``most`` from now on. No step is computed at sigma 0."""
    sigmas: Sequence[float] = list(dict.fromkeys(sigma for sigma in times.sigmas if sigma > 0.0 or times.now == 0.0))
    if len(sigmas) > most:
        sigmas = sigmas[sigmas.index(times.now) :][:most]
    return tuple(sigmas)
