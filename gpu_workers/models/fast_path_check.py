"""The fast path check: compare the first result of fused kernels with that of the unmodified modules."""

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
    """Checks one fast path. If its error exceeds the tolerance, only the plain path is used from then on."""

    def __init__(self, what: str, tolerance: float) -> None:
        self._what = what
        self._tolerance = tolerance
        self._passed: dict[Hashable, float] = {}
        self._checks: dict[str, FusedCheck] = {}
        self.is_refused = False

    def run(self, case: Hashable, fast: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the result of ``fast`` if it agreed with ``plain`` when this ``case`` first ran, else ``plain``'s.

        All ranks that share an image run the same case, and refuse together. If ``plain`` gives NaN or infinity, that
        is returned, and the case is checked when it runs next.
        """
        if self.is_refused:
            return plain()
        result = fast()
        if case in self._passed:
            return result
        expected = plain()
        if not agree(bool(expected.isfinite().all()), RankSet.SEQUENCE):
            # The weights are at fault, not the fast path: check again with the next ones.
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
        """Return the checks that are new since the last call, or changed by a refusal."""
        checks, self._checks = self._checks, {}
        return tuple(checks.values())[-limits.MAX_FUSED_CHECKS :]

    def _note(self, case: Hashable, error: float) -> None:
        checked = {**self._passed, case: error} if self.is_refused else {case: error}
        for each, found in checked.items():
            self._checks[str(each)] = FusedCheck(
                kernels=self._what,
                case=str(each)[: limits.MAX_NAME_CHARS],
                error=min(found, MAX_RELATIVE_ERROR) if math.isfinite(found) else None,
                tolerance=self._tolerance,
                is_used=not self.is_refused,
            )
