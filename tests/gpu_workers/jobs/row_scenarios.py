"""For ``rows_on_ranks.py``: calls whose parts and rows are computed by other ranks, and those that cannot be split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from counted_ranks import Output, Ranks, numbers
from torch.nn import functional

from xditd.ipc.errors import BadRequest, OtherRankFailed, OutOfMemory


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
