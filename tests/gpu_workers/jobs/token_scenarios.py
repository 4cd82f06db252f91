"""For ``rows_on_ranks.py``: calls whose tokens are split by a token plan: faults, compiled and captured forwards."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from counted_ranks import Ranks, check_same, numbers
from torch.nn import functional

from xditd.gpu_workers.kernels.branches import Branch, Strength
from xditd.gpu_workers.kernels.static_branches import Place
from xditd.gpu_workers.models import forward_paths
from xditd.gpu_workers.models.class_branches import branches_of
from xditd.gpu_workers.models.class_layout import SeparateLayout
from xditd.gpu_workers.models.graph_loras import GraphLoras
from xditd.gpu_workers.models.path_choice import LastRun
from xditd.gpu_workers.models.token_plans import Attention, PlanFault, Split, TokenPlan
from xditd.gpu_workers.parallel.rank_sync import RankSet
from xditd.ipc.errors import BadRequest


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
