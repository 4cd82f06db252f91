"""Ranks that run calls by a token plan, and compare the results with those of the class's own forward."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from plan_cases import Case, tensors_of

from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.token_plans import TokenPlan
from xditd.gpu_workers.parallel import streams
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.gpu_workers.parallel.token_shares import TokenShares

TIMEOUT_S = 20
"""How long a rank waits for the others, which have failed or computed something else."""

_groups: list[Any] = []
"""The group of the last case, for the next one, unless the case had a fault."""


@dataclass
class Finding:
    """What became of a call on all ranks."""

    error: float = 0.0
    is_same_again: bool = True
    is_same_on_ranks: bool = True
    fault: str = ""


def start_rank(rank: int, ranks: int, store: str) -> None:
    """Make this process a rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)


@torch.no_grad()
def run_case(case: Case, plan: TokenPlan, *, runs: int = 2) -> Finding:
    """Run a call with its tokens split over all ranks; all ranks return the same finding."""
    group = _groups.pop() if _groups else dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    found = Finding()
    try:
        planned = PlannedModule(case.model, plan)
        place = Ranks(group, dist.get_rank(), dist.get_world_size())
        with _checked_collectives():
            results = [_run(planned, case, place)]
        results += [_run(planned, case, place) for _ in range(runs - 1)]
        found.error = max(_error(mine, its) for mine, its in _pairs(results[0], case.expected))
        found.is_same_again = all(torch.equal(one, two) for one, two in zip(results[0], results[-1], strict=True))
        digest = _digest(results[0])
    except Exception as error:  # noqa: BLE001 - any error is a finding
        found.fault, digest = f"{type(error).__name__}: {error}", 0
        dist.destroy_process_group(group)  # ends what other ranks wait for
    agreed = _agree(found, digest)
    if not agreed.fault:
        _groups.append(group)
    elif not found.fault:
        dist.destroy_process_group(group)
    return agreed


def _run(planned: PlannedModule, case: Case, place: Ranks) -> tuple[torch.Tensor, ...]:
    """Return the tensors of the result and of caches after a call, the whole of those of which ranks have shares."""
    shares = TokenShares()
    found = planned.run(case.call, place, shares)
    return tuple(shares.whole(each, place) for each in tensors_of(found))


class _Checked:
    """torch.distributed, where ranks first compare what they are about to send.

    gloo ends the process if ranks run different collectives. Here all of them raise.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_gather_into_tensor(self, received: torch.Tensor, sent: torch.Tensor, group: Any) -> None:
        sizes = self._sizes([sent.numel()] * dist.get_world_size(), group)
        if (sizes != sent.numel()).any():
            raise ValueError(f"ranks gather parts of {sizes.diagonal().tolist()} bytes")
        dist.all_gather_into_tensor(received, sent, group=group)

    def all_to_all_single(
        self, received: torch.Tensor, sent: torch.Tensor, to: list[int], by: list[int], group: Any
    ) -> None:
        sizes = self._sizes([-each for each in by], group)  # negative: not those of another collective
        expected = self._sizes([-each for each in to], group)
        if (sizes != expected.t()).any():
            raise ValueError(f"ranks send {sizes.tolist()} bytes to each other and expect {expected.tolist()}")
        dist.all_to_all_single(received, sent, to, by, group=group)

    @staticmethod
    def _sizes(own: Sequence[int], group: Any) -> torch.Tensor:
        """Return the sizes of all ranks, one row each."""
        found = torch.zeros(len(own), len(own), dtype=torch.int64)
        found[dist.get_rank()] = torch.tensor(own)
        dist.all_reduce(found, group=group)
        return found


@contextmanager
def _checked_collectives() -> Iterator[None]:
    streams.dist = _Checked()  # type: ignore[assignment]
    try:
        yield
    finally:
        streams.dist = dist


def _pairs(mine: Sequence[Any], its: Sequence[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(mine, its, strict=True))


def _error(mine: torch.Tensor, its: torch.Tensor) -> float:
    if (mine.shape, mine.dtype) != (its.shape, its.dtype):
        raise ValueError(f"a result of {list(mine.shape)} instead of {list(its.shape)}")
    if not its.numel():
        return 0.0
    error = float((mine.double() - its.double()).abs().max() / its.double().abs().max())
    return error if error == error else float("inf")


def _digest(tensors: Sequence[torch.Tensor]) -> int:
    digest = hashlib.sha256()
    for each in tensors:
        digest.update(each.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest()[:7], "little")


def _agree(mine: Finding, digest: int) -> Finding:
    """Return what all ranks found: the largest error, and the first rank's fault."""
    highest = torch.tensor([mine.error, not mine.is_same_again, bool(mine.fault)], dtype=torch.float64)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    digests = torch.tensor([digest, -digest])
    dist.all_reduce(digests, dist.ReduceOp.MAX)
    fault = mine.fault
    if highest[2]:
        texts = torch.zeros(dist.get_world_size(), 400, dtype=torch.uint8)
        text = fault.encode()[:400]
        texts[dist.get_rank(), : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        dist.all_reduce(texts)
        faults = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in texts]
        # A rank that waited for one that failed says less than that one.
        fault = min((each for each in faults if each), key=lambda each: not each.startswith("PlanFault"))
    return Finding(float(highest[0]), not highest[1], int(digests[0]) == -int(digests[1]), fault)


def fork_ranks(run_rank: Callable[..., None], ranks: int, *given: Any) -> None:
    """Run ``run_rank(rank, *given)`` in a process for each rank, which has what this process has built."""
    torch.multiprocessing.start_processes(run_rank, given, nprocs=ranks, start_method="fork")
