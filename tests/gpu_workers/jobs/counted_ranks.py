"""For programs of tests: one of several ranks that runs calls of a module by rows, and counts its forwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from xditd.gpu_workers.jobs.module_rows import ModulePart, ModuleRows
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.split_checks import SplitChecks
from xditd.gpu_workers.models.token_plans import TokenPlan
from xditd.gpu_workers.parallel import streams
from xditd.gpu_workers.parallel.peer_exchange import PeerExchange
from xditd.gpu_workers.parallel.row_trees import tensors_of
from xditd.ipc.job_parts import Numerics


@dataclass
class Output(OrderedDict[str, Any]):
    """An output class as diffusers has them, whose import takes seconds."""

    sample: Any

    def __post_init__(self) -> None:
        self["sample"] = self.sample


class Ranks:
    """One rank, with a module whose forwards are counted."""

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self.calls = 0
        self.module: Any = None
        self.model: Any = None
        self.peers = PeerExchange(device, rank, ranks) if device.type == "cuda" else None

    def use(
        self, module: torch.nn.Module | Callable[..., Any], plan: TokenPlan | None = None, acceleration: str = "eager"
    ) -> None:
        """Lend a module, or a function as its forward."""
        if not isinstance(module, torch.nn.Module):
            function, module = module, torch.nn.Identity()
            module.forward = function  # type: ignore[method-assign]
        self.close()
        self.module = module.eval().to(self.device)
        self.model = SimpleNamespace(
            module=module,
            layout=SimpleNamespace(rank=self.rank, world_size=self.ranks),
            ranks=streams.Ranks(None, self.rank, self.ranks, peers=self.peers),
            device=self.device,
            class_name="Tested",
            planned="it has no token plan" if plan is None else PlannedModule(module, plan),
            split_checks=SplitChecks(reports=self.rank == 0),
            paths=ForwardPaths(module, "Tested", self.device, acceleration, is_leader=self.rank == 0),
        )
        self.model.paths.use_weights("a", dict(module.named_parameters()))

    def close(self) -> None:
        """Free graphs: with collectives in them, the process could not leave its group."""
        if self.model is not None:
            self.model.paths.close()

    def run(
        self, *parts: dict[str, Any], on_all_ranks: bool = False, loras: tuple[tuple[int, float], ...] = ()
    ) -> list[Any]:
        self.calls = 0

        def call(arguments: Mapping[str, Any]) -> Any:
            self.calls += 1
            return self.module(**arguments)

        rows = ModuleRows(self.model, "forward", Numerics(), call, has_loras=bool(loras))
        layout = self.model.loras.use(loras, len(parts)) if loras else None
        rows.use_layout(layout)
        return rows.run([ModulePart(part, on_all_ranks) for part in parts])

    def run_checked(self, *parts: dict[str, Any], calls: int | None = None, **options: Any) -> None:
        """Run parts twice, first checked, then shared; rank 0 has what the module gives by itself."""
        for _ in range(2):
            found = self.run(*parts, **options)
            if self.rank == 0:
                for part, mine in zip(parts, found, strict=True):
                    check_same(mine, self.module(**part))
        if calls is not None:
            assert self.count_all() == calls, f"{self.count_all()} forwards, not {calls}"

    def count_all(self) -> int:
        """Return the forwards of all ranks in the last call."""
        counted = torch.tensor(self.calls, device="cpu")
        dist.all_reduce(counted)
        return int(counted)

    def last_check(self) -> Any:
        return (self.model.split_checks.take_checks() or (None,))[-1]


def check_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected), f"{type(found)} instead of {type(expected)}"
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    for mine, its in pairs:
        assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(
        torch.get_default_device()
    )
