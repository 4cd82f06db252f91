"""A program, not a test: ranks run calls of modules by rows, and compare them with the modules themselves.

python rows_on_ranks.py FOLDER RANKS DEVICE, where DEVICE is cpu or cuda
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from xditd.gpu_workers.jobs.module_rows import ModulePart, ModuleRows
from xditd.gpu_workers.kernels.branches import Branch, Strength
from xditd.gpu_workers.kernels.static_branches import Place
from xditd.gpu_workers.models import forward_paths
from xditd.gpu_workers.models.class_branches import branches_of
from xditd.gpu_workers.models.class_layout import SeparateLayout
from xditd.gpu_workers.models.forward_paths import ForwardPaths
from xditd.gpu_workers.models.graph_loras import GraphLoras
from xditd.gpu_workers.models.path_choice import LastRun
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.split_checks import SplitChecks
from xditd.gpu_workers.models.token_plans import Attention, PlanFault, Split, TokenPlan
from xditd.gpu_workers.parallel import streams
from xditd.gpu_workers.parallel.peer_exchange import PeerExchange
from xditd.gpu_workers.parallel.rank_sync import RankSet
from xditd.gpu_workers.parallel.row_trees import tensors_of
from xditd.ipc.errors import BadRequest, OtherRankFailed, OutOfMemory
from xditd.ipc.job_parts import Numerics

LIMIT_S = 50.0
"""For one scenario."""


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


def parts_and_rows(on: Ranks) -> None:
    torch.manual_seed(0)
    on.use(torch.nn.Linear(4, 3))
    on.run_checked({"input": numbers(1, 4)}, calls=1)
    on.run_checked(*({"input": numbers(1, 4, seed=seed)} for seed in range(5)), calls=5)
    on.run_checked({"input": numbers(2, 4)}, calls=2)
    if on.rank == 0:
        check = on.last_check()
        assert (check.class_name, check.method, check.batch, check.is_used) == ("Tested", "forward", 2, True)
        assert check.error < check.tolerance == 1e-6
    on.run_checked({"input": numbers(7, 4)}, calls=min(on.ranks, 7))
    on.run_checked({"input": numbers(2, 4)}, {"input": numbers(3, 5, 4)}, {"input": torch.empty(0, 4)})


def all_kinds_of_results(on: Ranks) -> None:
    def kinds(x: torch.Tensor, texts: list[torch.Tensor], table: torch.Tensor) -> Any:
        options = (x > 0, x.bfloat16(), torch.complex(x, x), table, torch.tensor(3.0, device="cpu"), None, "text", 4)
        return Output(sample=([each * 2 for each in texts], {"x": x.long(), "more": options}))

    on.use(kinds)
    texts = [numbers(5, 2), numbers(3, 2), numbers(4, 2)]
    on.run_checked({"x": numbers(3, 2), "texts": texts, "table": numbers(6, 2)}, calls=-(-3 // -(-3 // on.ranks)))


def what_cannot_be_split(on: Ranks) -> None:
    everyone = on.ranks
    on.use(lambda x: x - x.mean(0))
    on.run_checked({"x": numbers(4, 2)}, calls=1)
    if on.rank == 0:
        assert not on.last_check().is_used
    on.use(lambda x: x.transpose(0, 1))
    on.run_checked({"x": numbers(4, 2)}, calls=1)

    def objects(x: torch.Tensor) -> Any:
        return SimpleNamespace(x=x)

    on.use(objects)
    on.run({"x": numbers(2, 2)})
    on.run({"x": numbers(2, 2)})
    assert on.count_all() == everyone
    on.use(lambda x: x * 2)
    on.module.training = True
    on.run_checked({"x": numbers(2, 2)}, calls=everyone)
    on.use(lambda x: x * 2)
    on.run_checked({"x": numbers(2, 2)}, calls=everyone, on_all_ranks=True)

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return x * self.count

    on.use(Counting())
    for number in range(12):
        found = on.run({"x": torch.ones(2, 2)})[0]
        assert found.tolist() == [[number + 1] * 2] * 2, "all ranks have run all calls, once each"


def a_table_that_is_made_once(on: Ranks) -> None:
    class Table(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "table"):
                self.table = torch.ones(2)
            return x + self.table

    on.use(Table())
    for _ in range(3):
        on.run({"x": numbers(on.ranks, 2)})
    assert on.count_all() == on.ranks, "by rows"


def a_later_call_that_does_not_fit(on: Ranks) -> None:
    def trimmed(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return x[:, : int(lengths.max())]

    on.use(trimmed)
    x = numbers(on.ranks, 4)
    alike = torch.full((on.ranks,), 4)
    on.run_checked({"x": x, "lengths": alike}, calls=on.ranks)
    for last in (3, 2):
        found = on.run({"x": x, "lengths": torch.full((on.ranks,), last)})
        assert on.rank != 0 or found[0].tolist() == x[:, :last].tolist()
    assert on.count_all() == on.ranks, "whole on every rank, after the refusal"
    if on.rank == 0:
        assert "structure" in on.last_check().detail


def errors_on_one_rank(on: Ranks) -> None:
    failing: list[Exception] = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        if failing and on.rank == 1:
            raise failing[0]
        return x * 2

    def meets(*parts: dict[str, Any]) -> Exception | None:
        try:
            on.run(*parts)
        except (BadRequest, OutOfMemory, OtherRankFailed) as error:
            return error
        return None

    one, rows = {"x": numbers(1, 2)}, {"x": numbers(on.ranks, 2)}
    for parts in ([one] * on.ranks, [rows]):
        for is_known in (False, True):
            if not is_known:
                on.use(fails)
            for error in (BadRequest("the class refused"), torch.OutOfMemoryError("no room")):
                failing.append(error)
                met = meets(*parts)
                failing.clear()
                mine = BadRequest if isinstance(error, BadRequest) else OutOfMemory
                expected = mine if on.rank == 1 else OtherRankFailed
                assert type(met) is expected, f"{met!r} of {len(parts)} parts, known: {is_known}"
            on.run_checked(*parts)


def refused_rows_that_are_right_together(on: Ranks) -> None:
    strict: list[bool] = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        if strict and x.shape[0] < on.ranks:
            raise BadRequest("too few rows")
        return x * 2

    on.use(fails)
    on.run_checked({"x": numbers(on.ranks, 2)}, calls=on.ranks)
    strict.append(True)
    on.run_checked({"x": numbers(on.ranks, 2)}, calls=on.ranks)


class Attending(torch.nn.Module):
    """Each token of a sequence attends to all, and to those of a text."""

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            query, key = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in (x, keys))
            return functional.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)

    def __init__(self) -> None:
        super().__init__()
        self.own, self.text = self.Attention(), self.Attention()
        self.last = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        if x.ndim == 4:
            x = x.flatten(1, 2)
        x = x + self.own(x, x)
        return self.last(x + self.text(x, text))


PLAN = TokenPlan(
    splits={"": {"x": Split("tokens", ndim=3)}},
    gathers={"last": {0: Split("tokens")}},
    attentions={
        "own": Attention(queries=("tokens",), keys=("tokens",)),
        "text": Attention(queries=("tokens",), keys=()),
    },
)


def tokens_of_every_row(on: Ranks) -> None:
    torch.manual_seed(0)
    on.use(Attending(), PLAN)
    text = numbers(1, 5, 8)
    for tokens in (16, 17):
        on.run_checked({"x": numbers(1, tokens, 8), "text": text}, calls=on.ranks)
        if on.rank == 0:
            check = on.last_check()
            assert (check.split, check.batch, check.is_used) == ("tokens", 1, True)
    # Rows that divide evenly need no exchange.
    rows = {"x": numbers(on.ranks, 7, 8), "text": text.expand(on.ranks, -1, -1)}
    on.run_checked(rows, calls=on.ranks)
    one = {"x": numbers(1, 16, 8), "text": text}
    on.run_checked(*[one] * on.ranks, calls=on.ranks)
    on.run_checked(*[one] * (on.ranks + 1), calls=on.ranks * (on.ranks + 1))


def tokens_that_the_plan_cannot_split(on: Ranks) -> None:
    on.use(Attending(), PLAN)
    text = numbers(1, 5, 8)
    on.run_checked({"x": numbers(1, 1, 8), "text": text}, calls=1)
    on.run_checked({"x": numbers(1, 4, 3, 8), "text": text}, calls=1)
    if on.rank == 0:
        assert "tokens" in on.last_check().detail
    wrong = replace(PLAN, attentions={**PLAN.attentions, "own": Attention(queries=("tokens",), keys=())})
    on.use(Attending(), wrong)
    on.run_checked({"x": numbers(1, 16, 8), "text": text}, calls=1)
    if on.rank == 0:
        assert "other results" in on.last_check().detail


class Wrong(Attending):
    def __init__(self, on: Ranks) -> None:
        super().__init__()
        self.rank, self.ranks = on.rank, on.ranks
        self.shortens = False
        self.refuses = False
        self.late: list[Exception] = []

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        last = 17 // self.ranks  # how many tokens of 17 the last rank has, and it alone
        if self.shortens:
            x = x[:, :last]
        if self.refuses and x.shape[1] == last:
            raise BadRequest("the class refused")
        found = super().forward(x, text)
        if self.late and self.rank == 1:
            raise self.late.pop()
        return found


def faults_of_one_rank(on: Ranks) -> None:
    """What is wrong on some ranks alone, while the others are about to meet in a collective or have ended."""
    torch.manual_seed(0)
    arguments = {"x": numbers(1, 17, 8), "text": numbers(1, 5, 8)}
    for name in ("shortens", "refuses"):
        on.use(Wrong(on), PLAN)
        setattr(on.module, name, True)
        on.run_checked(arguments, calls=1)
        if on.rank == 0:
            assert not on.last_check().is_used
    on.use(Wrong(on), PLAN)
    on.run_checked(arguments, calls=on.ranks)
    on.module.late.append(PlanFault("not as declared"))
    found = on.run(arguments)
    assert on.count_all() == 2 * on.ranks, "split, then whole on every rank"
    on.module.late.clear()
    if on.rank == 0:
        check_same(found[0], on.module(**arguments))
        assert "another worker" in on.last_check().detail


def ways_that_ranks_choose_together(on: Ranks) -> None:
    """Ranks decide the same forwards, whatever each has run alone, and whatever one of them lacks."""
    torch.manual_seed(0)
    on.use(Attending(), PLAN, acceleration="compiled")
    text = numbers(1, 5, 8)
    parts = [{"x": numbers(1, 16 + 4 * number, 8), "text": text} for number in range(on.ranks)]
    for _ in range(4):  # each rank runs another part alone
        on.run(*parts)
        on.model.paths.decide()
    for part in parts:  # all ranks run it together
        for _ in range(3):
            (found,) = on.run(part)
            assert on.count_all() == on.ranks
            on.model.paths.decide()
            if on.rank == 0:
                check_same(found, on.module(**part))
    if on.rank == 0:
        reports = on.model.paths.take_reports()
        assert [each.split for each in reports] == ["whole", *["tokens"] * on.ranks], reports

    # A fault at the end, where the others have a result to decide by.
    on.use(Wrong(on), PLAN, acceleration="compiled")
    on.run(parts[0])
    on.run(parts[0])
    on.module.late.append(PlanFault("not as declared"))
    on.run(parts[0])
    on.module.late.clear()
    on.model.paths.decide()
    on.run(parts[0])

    # One rank has no room for copies, which is found before it can fail.
    on.use(Attending(), PLAN, acceleration="compiled")
    copy = forward_paths._copy
    if on.rank == 1:
        forward_paths._copy = lambda _: None
    for _ in range(6):
        (found,) = on.run(parts[0])
        on.model.paths.decide()
        if on.rank == 0:
            check_same(found, on.module(**parts[0]))
    forward_paths._copy = copy
    if on.rank == 0:
        (report,) = on.model.paths.take_reports()
        assert report.path == "eager"
        assert "no memory to compare" in report.detail


def rows_without_room_when_they_are_checked(on: Ranks) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        if on.rank == 1 and x.shape[0] < on.ranks:
            raise OutOfMemory("no room in the worker's memory")
        return x * 2

    on.use(fails)
    on.run_checked({"x": numbers(on.ranks, 2)}, calls=1)
    if on.rank == 0:
        assert not on.last_check().is_used


class Remainders(torch.nn.Module):
    """What is left of a product in bfloat16 without most of the exact one: a rounding changes much of that.

    Some rows alone have other last places in ``every``-th value, as those of another kernel, and are ``wrong`` beyond.
    """

    def __init__(self, rows: int, every: int, wrong: float) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 64, bias=False)
        self.rows, self.every, self.wrong = rows, every, wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.first(x)
        if len(x) < self.rows:
            bits = product.view(torch.int16)
            bits[..., :: self.every] ^= 1
        exact = functional.linear(x.float(), self.first.weight.float())
        rest = product.float() - 0.97 * exact
        return (rest + (self.wrong * rest.roll(1) if len(x) < self.rows else 0)).bfloat16()


def roundings_that_a_model_makes_much_of(on: Ranks) -> None:
    for every, wrong, is_used in ((8, 0.0, True), (1, 0.5, False)):
        torch.manual_seed(0)
        on.use(Remainders(rows := 64 * on.ranks, every, wrong).bfloat16())
        before = torch.get_rng_state()
        on.run({"x": numbers(rows, 64).bfloat16()})
        assert torch.equal(before, torch.get_rng_state())
        if on.rank == 0:
            check = on.last_check()
            assert check.is_used == is_used, check
            assert check.error > 0.02, "the fixed tolerance allows it"
            assert check.tolerance > 0.02


def forwards_that_are_captured(on: Ranks) -> None:
    """Tokens of every row, and rows, as graphs: the results of new arguments, without a forward of the class."""
    if on.device.type != "cuda":
        return
    torch.manual_seed(0)
    on.use(Attending(), PLAN, acceleration="captured")
    whole = Attending().to(on.device)
    whole.load_state_dict(on.module.state_dict())
    for tokens, rows in ((16, 1), (17, 1), (7, on.ranks)):
        eager_calls = []
        for seed in range(6):
            part = {"x": numbers(rows, tokens, 8, seed=seed), "text": numbers(rows, 5, 8, seed=seed)}
            (found,) = on.run(part)
            eager_calls.append(on.count_all())
            on.model.paths.decide()
            if on.rank == 0:
                check_same(found, whole(**part))
        assert eager_calls[3:] == [0, 0, 0], eager_calls
    if on.rank == 0:
        reports = on.model.paths.take_reports()
        assert [each.path for each in reports] == ["captured"] * len(reports), reports
        assert {each.split for each in reports} == {"tokens", "whole"}

    # A forward for which the host waits stays eager on all ranks, and is right.
    class Waiting(Attending):
        def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(x, text) * float(text.sum().sign().abs())

    on.use(Waiting(), PLAN, acceleration="captured")
    part = {"x": numbers(1, 16, 8), "text": numbers(1, 5, 8)}
    for _ in range(5):
        on.run(part)
        on.model.paths.decide()
    if on.rank == 0:
        (report,) = on.model.paths.take_reports()
        assert (report.path, "host waits" in report.detail) == ("eager", True), report


def forwards_with_loras_that_are_captured(on: Ranks) -> None:
    """Another LoRA and another strength need no new graph, by tokens and by rows.

    Without GPUs a graph is the forward itself, with no LoRA on.
    """
    torch.manual_seed(0)
    on.use(Attending(), PLAN, acceleration="captured")
    if on.device.type != "cuda":

        def capture(last: LastRun) -> tuple[Any, str]:
            def replay_last() -> Any:
                return last.forward(last.arguments)

            graph = SimpleNamespace(run=last.forward, replay_last=replay_last, memory_bytes=0)
            return graph, ""

        on.model.paths._chooser.captures = True
        on.model.paths._chooser._try_capture = capture
    whole = Attending().to(on.device)
    whole.load_state_dict(on.module.state_dict())
    known = branches_of(on.module), branches_of(whole)
    places = [Place(each, on.module.get_submodule(path).out_features) for path, each in known[0].items()]
    on.model.loras = GraphLoras(SeparateLayout, lambda: places, on.model.paths, RankSet.GROUP)
    loras = []
    for number in (1, 2):
        strength = Strength(number)
        loras.append((strength, {
            name: Branch(
                numbers(2, on.module.get_submodule(name).in_features, seed=number),
                numbers(on.module.get_submodule(name).out_features, 2, seed=number) / 4, 0.5, strength,
            )
            for name in known[0]
        }))  # fmt: skip
    for tokens, rows in ((16, 1), (17, 1), (7, on.ranks)):
        eager_calls = []
        for seed in range(6):
            strength, branches = loras[seed % 2]
            strength.value = 0.2 + 0.1 * seed
            for places_of_one in known:
                for name, each in branches.items():
                    places_of_one[name].active = (each,)
            part = {"x": numbers(rows, tokens, 8, seed=seed), "text": numbers(rows, 5, 8, seed=seed)}
            (found,) = on.run(part, loras=((strength.number, strength.value),))
            eager_calls.append(on.count_all())
            if on.rank == 0:
                check_same(found, whole(**part))
            for each in (*known[0].values(), *known[1].values()):
                each.active = ()
            on.model.paths.decide()
        assert eager_calls[3:] == [0, 0, 0], eager_calls
    assert on.model.loras.counts.layouts == 1


def run_rank(rank: int, folder: str, ranks: int, device_type: str) -> None:
    from xditd.gpu_workers.parallel import rank_sync

    store = dist.FileStore(f"{folder}/store", ranks)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    rank_sync.share_page(store, "flags", rank, ranks)
    for scenario in (
        parts_and_rows,
        all_kinds_of_results,
        what_cannot_be_split,
        a_table_that_is_made_once,
        a_later_call_that_does_not_fit,
        errors_on_one_rank,
        refused_rows_that_are_right_together,
        tokens_of_every_row,
        tokens_that_the_plan_cannot_split,
        faults_of_one_rank,
        ways_that_ranks_choose_together,
        rows_without_room_when_they_are_checked,
        roundings_that_a_model_makes_much_of,
        forwards_that_are_captured,
        forwards_with_loras_that_are_captured,
    ):
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # where a rank waits for another one
        try:
            on = Ranks(rank, ranks, device)
            with torch.no_grad(), device:
                scenario(on)
            on.close()
        except Exception:  # noqa: BLE001 - at once: communicators that are closed wait for the other ranks
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        print(f"rank {rank}: {scenario.__name__}\n", end="", flush=True)  # one write: ranks share the pipe
    dist.destroy_process_group()


def main(folder: str, ranks: int, device: str) -> None:
    method = "fork" if device == "cpu" else "spawn"  # forked ranks need not import torch again
    torch.multiprocessing.start_processes(run_rank, (folder, ranks, device), nprocs=ranks, start_method=method)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
