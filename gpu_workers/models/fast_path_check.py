"""The fast path check: compare the first result of fused kernels with that of the unmodified modules."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.rounding_noise import rounding_noise
from xditd.gpu_workers.models.split_checks import Difference
from xditd.gpu_workers.parallel.rank_sync import RankSet, agree
from xditd.ipc import limits
from xditd.ipc.protocol import MAX_RELATIVE_ERROR
from xditd.ipc.status import FusedCheck

logger = logging.getLogger(__name__)

_is_warm_up = False


@contextmanager
def warming_up() -> Iterator[None]:
    """Within, checks run both paths and do not compare the results: the weights are random."""
    global _is_warm_up
    _is_warm_up = True
    try:
        yield
    finally:
        _is_warm_up = False


class FastPathCheck:
    """Checks one fast path. If its error exceeds the tolerance, only the plain path is used from then on.

    ``module`` is that of the plain path. In bfloat16 or float16 the tolerance is larger, if roundings alone change more
    in its result (``rounding_noise``).
    """

    def __init__(self, what: str, tolerance: float, module: torch.nn.Module | None = None) -> None:
        self._what = what
        self._tolerance = tolerance
        self._module = module
        self._passed: dict[Hashable, Difference] = {}
        self._checks: dict[str, FusedCheck] = {}
        self.is_refused = False

    def run(self, case: Hashable, fast: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the result of ``fast`` if it agreed with ``plain`` when this ``case`` first ran, else ``plain``'s.

        All ranks that share an image run the same case, and refuse together. If ``plain`` gives NaN or infinity, that
        is returned, and the case is checked when it runs next.
        """
        if self.is_refused:
            return plain()
        if case in self._passed:
            return fast()
        if _is_warm_up:
            fast()
            return plain()
        clock = Clock()
        result = fast()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        clock.mark("fast")
        expected = plain()
        is_finite = bool(expected.isfinite().all())
        clock.mark("plain")
        if not agree(is_finite, RankSet.SEQUENCE):
            # The weights are at fault, not the fast path: check again with the next ones.
            return expected
        found = Difference(_relative(result, expected), self._tolerance)
        if self._module is not None and not agree(found.is_allowed, RankSet.SEQUENCE):
            with rounding_noise(self._module):
                found = found.with_noise(_relative(plain(), expected))
        self.is_refused = not agree(found.is_allowed, RankSet.SEQUENCE)
        self._note(case, found)
        if self.is_refused:
            logger.error("%s refused case=%s error=%.3g tolerance=%.3g", self._what, case, *found)
            return expected
        logger.info(
            "%s agree with the plain path case=%s error=%.2e tolerance=%.2g fast_ms=%.0f plain_ms=%.0f",
            self._what, case, *found, *clock.marks_ms.values(),
        )  # fmt: skip
        self._passed[case] = found
        return result

    def take_checks(self) -> tuple[FusedCheck, ...]:
        """Return the checks that are new since the last call, or changed by a refusal."""
        checks, self._checks = self._checks, {}
        return tuple(checks.values())[-limits.MAX_FUSED_CHECKS :]

    def _note(self, case: Hashable, difference: Difference) -> None:
        checked = {**self._passed, case: difference} if self.is_refused else {case: difference}
        for each, found in checked.items():
            self._checks[str(each)] = FusedCheck(
                kernels=self._what,
                case=str(each)[: limits.MAX_NAME_CHARS],
                error=min(found.error, MAX_RELATIVE_ERROR) if math.isfinite(found.error) else None,
                tolerance=found.tolerance,
                is_used=not self.is_refused,
            )


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
