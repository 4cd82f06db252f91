"""Branches of a module that runs as its class: another class of layer for as long as there are any."""

from __future__ import annotations

import torch

from xditd.gpu_workers.kernels.branches import Branch, Strength, add_as_peft
from xditd.gpu_workers.models.class_branches import branches_of, targets_in


def branch(rank: int, inputs: int, rows: int, strength: Strength, *, start: int = 0) -> Branch:
    return Branch(torch.randn(rank, inputs), torch.randn(rows, rank), 0.5, strength, start)


def test_a_layer_is_of_its_class_between_jobs() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 3))
    before = [dict(vars(each)) for each in module.modules()]
    x = torch.randn(2, 5, 4)
    plain = module(x)
    found = branches_of(module)
    assert list(found) == ["0", "2"]
    strength = Strength()
    strength.value = 0.7
    added = branch(2, 4, 6, strength)
    with torch.no_grad():
        found["0"].active += (added,)
        assert isinstance(module[0], torch.nn.Linear)
        changed = module[0](x)
        right = torch.nn.functional.linear(x, module[0].weight, module[0].bias)
        right = right + torch.nn.functional.linear(torch.nn.functional.linear(x, added.down), added.up) * 0.35
        assert torch.equal(changed, right)
        found["0"].active = ()
    assert type(module[0]) is torch.nn.Linear
    assert [dict(vars(each)) for each in module.modules()] == before
    assert torch.equal(module(x), plain)


def test_rows_of_some_outputs_and_other_dtypes() -> None:
    torch.manual_seed(0)
    strength = Strength()
    strength.value = 1.0
    part = branch(2, 4, 3, strength, start=2)
    x, y = torch.randn(7, 4, dtype=torch.bfloat16), torch.randn(7, 6, dtype=torch.bfloat16)
    found = add_as_peft([part], y, x)
    assert found.dtype == torch.bfloat16
    right = y.float()
    right[:, 2:5] += (x.float() @ part.down.T @ part.up.T) * 0.5
    assert torch.equal(found, right.to(torch.bfloat16))
    strength.value = 0.0
    assert torch.equal(add_as_peft([part], y, x), y)


def test_names_that_are_alike_are_those_of_no_layer() -> None:
    module = torch.nn.ModuleDict({"a_b": torch.nn.Linear(2, 2), "a": torch.nn.ModuleDict({"b": torch.nn.Linear(2, 2)})})
    module["c"] = torch.nn.Linear(2, 3)
    targets = targets_in(module, branches_of(module))
    assert {name: (each.outputs, each.inputs) for name, each in targets.items()} == {"c": (3, 2)}
