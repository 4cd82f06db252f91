"""Correct before fast: the first result of a fast path is compared with the plain one; a wrong one is never used."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable

import torch

from xditd.gpu_workers.parallel.rank_sync import RankSet, agree
from xditd.ipc import limits
from xditd.ipc.protocol import MAX_RELATIVE_ERROR
from xditd.ipc.status import FusedCheck

logger = logging.getLogger(__name__)


class FastPathCheck:
    """Judges one fast path. Beyond the tolerance the plain path is used from then on; log and ``status`` say so."""

    def __init__(self, what: str, tolerance: float) -> None:
        self._what = what
        self._tolerance = tolerance
        self._passed: dict[Hashable, float] = {}
        self._checks: dict[str, FusedCheck] = {}
        self.is_refused = False

    def run(self, case: Hashable, fast: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what ``fast`` gives, if it agreed with ``plain`` when this ``case`` first ran; else ``plain``'s.

        All ranks that share an image run the same case, and what one of them refuses all do. Where ``plain`` gives NaN
        or infinity, that is returned, and the case is judged when it runs next.
        """
        if self.is_refused:
            return plain()
        result = fast()
        if case in self._passed:
            return result
        expected = plain()
        if not agree(bool(expected.isfinite().all()), RankSet.SEQUENCE):
            # The weights are at fault, and the next ones may be sound: there is nothing to judge the path by.
            return expected
        error = float((result.float() - expected.float()).norm() / expected.float().norm())
        # Not "error > tolerance": a NaN must be refused, too.
        self.is_refused = not agree(error <= self._tolerance, RankSet.SEQUENCE)
        self._note(case, error)
        if self.is_refused:
            logger.error("%s refused case=%s error=%.3g tolerance=%g", self._what, case, error, self._tolerance)
            return expected
        logger.info("%s agree with the plain path case=%s error=%.2e", self._what, case, error)
        self._passed[case] = error
        return result

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Hand out the verdicts that are new since the last call, or changed by a refusal."""
        checks, self._checks = self._checks, {}
        return tuple(checks.values())[-limits.MAX_FUSED_CHECKS :]

    def _note(self, case: Hashable, error: float) -> None:
        judged = {**self._passed, case: error} if self.is_refused else {case: error}
        for each, found in judged.items():
            self._checks[str(each)] = FusedCheck(
                kernels=self._what,
                case=str(each)[: limits.MAX_NAME_CHARS],
                error=min(found, MAX_RELATIVE_ERROR) if math.isfinite(found) else None,
                tolerance=self._tolerance,
                is_used=not self.is_refused,
            )
