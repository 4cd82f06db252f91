from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.utils.torch_utils import lru_cache_unless_export

from xditd.gpu_workers.models.cached_methods import CachedMethods


def module_with(decorator: Callable[[Any], Any]) -> Any:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0
            self.computed = 0

        @decorator
        def rows(self, count: int, *, start: int = 0) -> torch.Tensor:
            """Return the rows."""
            self.computed += 1
            return torch.arange(start, start + count) * self.scale

    module = torch.nn.Module()
    module.table = Table()
    return module


@pytest.mark.parametrize(
    "decorator",
    [functools.lru_cache(maxsize=2), functools.cache, lru_cache_unless_export(maxsize=None)],
    ids=["lru_cache", "cache", "of diffusers"],
)
def test_each_loan_has_its_own_results(decorator: Callable[[Any], Any]) -> None:
    module = module_with(decorator)
    table = module.table
    before = dict(vars(table))
    expected = table.rows(3, start=1)
    loans = [CachedMethods(module) for _ in range(2)]
    for loan, scale in zip(loans, (2.0, 3.0), strict=True):
        table.scale = scale
        loan.install()
        assert torch.equal(table.rows(3, start=1), expected * scale)
    loans[0].install()
    computed = table.computed
    assert torch.equal(table.rows(3, start=1), expected * 2.0)
    assert table.computed == computed
    assert table.rows.__doc__ == "Return the rows."
    del vars(table)["rows"]
    assert vars(table).keys() == before.keys()


def test_methods_that_the_module_has_itself_stay() -> None:
    module = module_with(functools.cache)
    module.table.rows = own = torch.arange
    CachedMethods(module).install()
    assert module.table.rows is own
