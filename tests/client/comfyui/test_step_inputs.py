"""Step inputs: numbers read on the host, and conditioning that is found again by content."""

from __future__ import annotations

import pytest
import torch

from xditd.client.comfyui import step_inputs
from xditd.client.comfyui.step_inputs import KNOWN_ROWS, StepInputs, Texts


class Keeper:
    """Records the kept rows, and returns a row's number as its kept form."""

    def __init__(self) -> None:
        self.rows: list[Texts] = []

    def __call__(self, texts: Texts) -> dict[str, int]:
        self.rows.append(texts)
        return {"kept": len(self.rows)}


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


def texts(*values: float, width: int = 3) -> dict[str, torch.Tensor]:
    rows = torch.tensor(values)[:, None]
    return {"embeds": rows.expand(-1, width).clone(), "pooled": rows + 100}


def test_numbers_come_by_name_whatever_their_dtypes(keeper):
    numbers = {"time": torch.tensor([0.1, 0.2]), "scale": torch.tensor([3.5, 4.5], dtype=torch.bfloat16)}
    inputs = StepInputs()
    for _ in range(2):  # the second time beside the comparison with the first
        found, kept = inputs.read(2, numbers, texts(1.0, 2.0), keeper)
        assert found == {"time": torch.tensor([0.1, 0.2]).tolist(), "scale": [3.5, 4.5]}
        assert kept == [{"kept": 1}, {"kept": 2}]


def test_equal_rows_are_kept_once(keeper):
    inputs = StepInputs()
    _, kept = inputs.read(3, {"time": torch.zeros(3)}, texts(1.0, 1.0, 2.0), keeper)
    assert kept[0] is kept[1] is not kept[2]
    _, again = inputs.read(1, {"time": torch.zeros(1)}, texts(2.0), keeper)
    assert again[0] is kept[2]
    assert len(keeper.rows) == 2


@pytest.mark.parametrize("name", ["embeds", "pooled"])
def test_what_changes_in_place_between_two_steps_is_seen(name, keeper):
    inputs = StepInputs()
    given = texts(1.0)
    _, (first,) = inputs.read(1, {"time": torch.zeros(1)}, given, keeper)
    given[name] += 1
    _, (second,) = inputs.read(1, {"time": torch.zeros(1)}, given, keeper)
    given[name] -= 1
    _, (third,) = inputs.read(1, {"time": torch.zeros(1)}, given, keeper)
    assert first is third is not second


def test_only_a_few_rows_are_remembered(keeper):
    inputs = StepInputs()
    for value in range(KNOWN_ROWS + 1):
        inputs.read(1, {"time": torch.zeros(1)}, texts(float(value)), keeper)
    inputs.read(1, {"time": torch.zeros(1)}, texts(0.0), keeper)
    assert len(keeper.rows) == KNOWN_ROWS + 2
    inputs.read(1, {"time": torch.zeros(1)}, texts(0.0, width=4), keeper)  # another shape is another row
    assert len(keeper.rows) == KNOWN_ROWS + 3


def test_fewer_rows_are_remembered_if_they_are_large(keeper, monkeypatch):
    monkeypatch.setattr(step_inputs, "LARGE_BYTES", 5 * 16)  # rows of 16 bytes
    inputs = StepInputs()
    read = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 2.0, 3.0, 4.0, 5.0]
    for value in read:
        inputs.read(1, {"time": torch.zeros(1)}, texts(value), keeper)
    assert len(keeper.rows) == 6
    inputs.read(1, {"time": torch.zeros(1)}, texts(1.0), keeper)
    assert len(keeper.rows) == 7


def test_the_host_waits_once_a_step(keeper, monkeypatch):
    inputs = StepInputs()
    inputs.read(2, {"time": torch.zeros(2)}, texts(1.0, 2.0), keeper)
    waits = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)

        def noted(tensor: torch.Tensor, original=original, name=name):  # type: ignore[no-untyped-def]
            waits.append(name)
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, noted)
    inputs.read(2, {"time": torch.zeros(2)}, texts(1.0, 2.0), keeper)
    assert waits == ["tolist"]
