"""The verdicts on calls of a module, their keys, and what a forward has changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from xditd.gpu_workers.models.split_checks import (
    MAX_CASES,
    MAX_CHECKS,
    TOLERANCE,
    TOLERANCE_OF_HALVES,
    Case,
    CaseKey,
    ModuleSnapshot,
    SplitChecks,
    difference,
)
from xditd.gpu_workers.parallel.row_trees import structure_of
from xditd.ipc.status import SplitCheck

CHECK = SplitCheck(class_name="A", method="forward", batch=2, error=0.0, tolerance=1e-5, is_used=True)


def key(method: str = "forward", batch: int = 2, **arguments: Any) -> CaseKey:
    return CaseKey.of(method, None, arguments, batch)


def test_cases_differ_by_shapes_dtypes_and_values_but_not_by_the_numbers_in_tensors() -> None:
    first = key(x=torch.rand(2, 3), scale=1.0)
    assert key(x=torch.rand(2, 3), scale=1.0) == first
    for other in (
        key(x=torch.rand(2, 4), scale=1.0),
        key(x=torch.rand(2, 3).half(), scale=1.0),
        key(x=torch.rand(2, 3), scale=2.0),
        key(x=torch.rand(2, 3), scale=1),
        key(x=[torch.rand(2, 3)], scale=1.0),
        key(y=torch.rand(2, 3), scale=1.0),
        key(x=torch.rand(2, 3), scale=1.0, mask=None),
        key("decode", x=torch.rand(2, 3), scale=1.0),
    ):
        assert other != first


def test_tensors_whose_rows_are_alike_are_another_case() -> None:
    """Half of them as rows would be given to the class without any difference, also if they are no rows."""
    row = torch.rand(1, 3)
    assert key(x=row.expand(2, 3)) != key(x=torch.rand(2, 3))
    assert key(x=row.expand(2, 3)) == key(x=torch.zeros(2, 3))
    assert key(x=torch.zeros(2, 3).to(torch.float8_e4m3fn)) == key(x=torch.ones(2, 3).to(torch.float8_e4m3fn))


def test_the_oldest_verdicts_are_forgotten() -> None:
    checks = SplitChecks(reports=True)
    keys = [key(x=torch.rand(2, each + 1)) for each in range(MAX_CASES + 1)]
    checks.note(keys[0], Case(None))
    checks.note(keys[1], Case(structure_of(torch.rand(2), 2), 2))
    checks.find(keys[0])
    for each in keys[2:]:
        checks.note(each, Case(None))
    assert checks.find(keys[0]) == Case(None)
    assert checks.find(keys[1]) is None


def test_a_value_that_is_new_in_each_call_is_not_checked_for_ever() -> None:
    checks = SplitChecks(reports=True)
    x = torch.rand(2, 3)
    for number in range(MAX_CHECKS):
        assert checks.find(key(x=x, step=number)) is None
        checks.count(key(x=x, step=number))
    assert checks.find(key(x=x, step=-1)) == Case(None)
    assert checks.find(key(x=x[:, :1], step=-1)) is None


@pytest.mark.parametrize("reports", [True, False])
def test_one_rank_reports_each_check_once(reports: bool) -> None:
    checks = SplitChecks(reports=reports)
    checks.note(key(x=torch.rand(2)), Case(None), CHECK)
    checks.note(key(x=torch.rand(1)), Case(None))
    assert checks.take_checks() == ((CHECK,) if reports else ())
    assert checks.take_checks() == ()


def test_errors_are_relative_to_the_largest_value_or_to_the_norm() -> None:
    expected = torch.tensor([1.0, -4.0])
    found = torch.tensor([1.0, -4.0 + 4e-4])
    single = difference(found, expected, in_halves=False)
    assert single.error == pytest.approx(1e-4, rel=1e-2)
    assert single.tolerance == TOLERANCE
    assert difference(found, expected, in_halves=True).tolerance == TOLERANCE_OF_HALVES
    half = difference(torch.tensor([3.0, 4.1]).bfloat16(), torch.tensor([3.0, 4.0]).bfloat16(), in_halves=False)
    assert half.error == pytest.approx(0.1 / 5, rel=0.2)
    assert half.tolerance == TOLERANCE_OF_HALVES
    turned = difference(torch.tensor([1j]), torch.tensor([1 + 0j]), in_halves=False)
    assert turned.error == pytest.approx(math.sqrt(2))


def test_whole_numbers_are_equal_or_not() -> None:
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 2]), in_halves=False).error == 0.0
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3]), in_halves=False).error == math.inf
    assert difference(torch.tensor([1.0]), torch.tensor([0.0]), in_halves=False).error == math.inf
    assert difference(torch.tensor([0.0]), torch.tensor([0.0]), in_halves=False).error == 0.0
    assert difference(torch.empty(0), torch.empty(0), in_halves=False).error == 0.0


class Stateful(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.BatchNorm1d(3)
        self.caches: list[torch.Tensor | None] = [None]
        self.index = 0


def test_a_snapshot_shows_what_a_forward_has_changed() -> None:
    module = Stateful()
    kept = ModuleSnapshot(module)
    module.caches = [None]  # as classes clear their caches
    assert kept.is_same

    def changed(change: Any) -> bool:
        before = ModuleSnapshot(module)
        change()
        return not before.is_same

    assert changed(lambda: setattr(module, "index", 1))
    assert changed(lambda: setattr(module, "table", torch.ones(1)))
    assert changed(lambda: module.caches.append(None))
    assert changed(lambda: module.caches.__setitem__(0, torch.ones(1)))
    assert changed(lambda: module.inner(torch.rand(2, 3)))
    with torch.inference_mode():
        module.caches[0] = torch.ones(1)  # as a forward keeps a table within a generation; it counts no writes
    assert not changed(lambda: None)
    assert changed(lambda: module.caches.__setitem__(0, torch.ones(1)))
