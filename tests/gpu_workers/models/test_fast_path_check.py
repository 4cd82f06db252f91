"""The fast path check: a fast path is used for a case once it agreed with the plain one, and never after a failure."""

from __future__ import annotations

import pytest
import torch

from xditd.gpu_workers.models.fast_path_check import FastPathCheck, warming_up
from xditd.gpu_workers.parallel.layouts import ParallelLayout

pytestmark = pytest.mark.usefixtures("layout")  # verdicts are agreed on in the process group

TOLERANCE = 0.02
RIGHT = torch.arange(1.0, 9.0)


class Path:
    """A path that gives one result, and counts how often it was asked for it."""

    def __init__(self, result: torch.Tensor) -> None:
        self.result = result
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return self.result


def test_the_plain_path_runs_once_for_each_case(layout: ParallelLayout) -> None:
    check, fast, plain = FastPathCheck("path", TOLERANCE), Path(RIGHT * (1 + TOLERANCE / 2)), Path(RIGHT)
    results = [check.run(case, fast, plain) for case in ("a", "a", "b", "a")]
    assert all(result is fast.result for result in results)
    assert (fast.calls, plain.calls) == (4, 2)
    assert not check.is_refused


@pytest.mark.parametrize(
    "wrong",
    [RIGHT * (1 + 2 * TOLERANCE), torch.zeros(8), torch.full((8,), torch.nan), torch.full((8,), torch.inf)],
    ids=["off", "zeros", "NaN", "infinite"],
)
def test_a_wrong_result_is_never_given(layout: ParallelLayout, wrong: torch.Tensor) -> None:
    check, fast, plain = FastPathCheck("path", TOLERANCE), Path(wrong), Path(RIGHT)
    assert check.run("a", fast, plain) is RIGHT
    assert check.is_refused
    assert check.run("b", fast, plain) is RIGHT
    assert fast.calls == 1


@pytest.mark.parametrize("result", [RIGHT.clone(), torch.zeros(8)], ids=["right", "wrong"])
def test_a_warm_up_runs_both_paths_and_compares_nothing(layout: ParallelLayout, result: torch.Tensor) -> None:
    check, fast, plain = FastPathCheck("path", TOLERANCE), Path(result), Path(RIGHT)
    with warming_up():
        assert check.run("a", fast, plain) is RIGHT
    assert (fast.calls, plain.calls) == (1, 1)
    assert (check.is_refused, check.take_checks()) == (False, ())
    assert check.run("a", Path(RIGHT.clone()), plain) is not RIGHT  # judged now
    assert len(check.take_checks()) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_say_nothing_of_the_path(layout: ParallelLayout, value: float) -> None:
    check, broken, sound = FastPathCheck("path", TOLERANCE), torch.full((8,), value), Path(RIGHT.clone())
    assert check.run("a", Path(broken.clone()), Path(broken)) is broken
    assert not check.is_refused
    assert check.take_checks() == ()
    assert check.run("a", sound, Path(RIGHT)) is sound.result  # judged now
    assert check.run("b", Path(broken.clone()), Path(RIGHT)) is RIGHT
    assert check.is_refused


def test_a_case_that_fails_later_turns_the_path_off_for_those_that_passed(layout: ParallelLayout) -> None:
    check, plain = FastPathCheck("path", TOLERANCE), Path(RIGHT)
    assert check.run("a", Path(RIGHT.clone()), plain) is not RIGHT
    assert check.run("b", Path(-RIGHT), plain) is RIGHT
    assert check.run("a", Path(RIGHT.clone()), plain) is RIGHT


def test_every_verdict_is_handed_out_once(layout: ParallelLayout) -> None:
    check, plain = FastPathCheck("path", TOLERANCE), Path(RIGHT)
    check.run("a", Path(RIGHT * (1 + TOLERANCE / 2)), plain)
    check.run("a", Path(RIGHT.clone()), plain)
    (found,) = check.take_checks()
    assert (found.kernels, found.case, found.is_used, found.tolerance) == ("path", "a", True, TOLERANCE)
    assert found.error == pytest.approx(TOLERANCE / 2, rel=1e-4)
    assert check.take_checks() == ()


def test_a_refusal_is_handed_out_with_all_that_it_turns_off(layout: ParallelLayout) -> None:
    check, plain = FastPathCheck("path", TOLERANCE), Path(RIGHT)
    check.run("a", Path(RIGHT.clone()), plain)
    check.take_checks()
    check.run("b", Path(torch.full((8,), torch.nan)), plain)
    checks = {each.case: each for each in check.take_checks()}
    assert not any(check.is_used for check in checks.values())
    assert (checks["a"].error, checks["b"].error) == (0.0, None)


def test_a_deep_model_may_differ_by_what_its_roundings_change(layout: ParallelLayout) -> None:
    """A plain path that doubles every difference in the last place of its layers."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    packed = torch.nn.Sequential(layer)
    given = torch.randn(16, 64, dtype=torch.bfloat16)
    exact = packed(given).detach()

    def plain() -> torch.Tensor:
        return exact + 20 * (packed(given).detach() - exact)

    near, far = exact * (1 + 1.5 * TOLERANCE), exact * (1 + 10 * TOLERANCE)
    strict = FastPathCheck("path", TOLERANCE)
    assert torch.equal(strict.run("a", Path(near), plain), exact)
    assert strict.is_refused
    check = FastPathCheck("path", TOLERANCE, packed)
    assert check.run("a", Path(near), plain) is near
    (found,) = check.take_checks()
    assert found.error is not None
    assert TOLERANCE < found.error < found.tolerance < 0.1
    assert torch.equal(check.run("b", Path(far), plain), exact)
    assert check.is_refused
