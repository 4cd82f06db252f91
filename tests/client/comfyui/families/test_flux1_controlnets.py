"""What stands for residuals while ComfyUI scales and adds them, and how a call reads it."""

from __future__ import annotations

from typing import Any, cast

import pytest

torch = pytest.importorskip("torch")

from xditd.client.comfyui.families.adapter import ControlCall, Residual  # noqa: E402
from xditd.client.comfyui.families.flux1_controlnets import RESIDUALS, KeptPictures, read_controls  # noqa: E402
from xditd.client.jobs.arguments import KeptTensor, RowsOf  # noqa: E402

DOUBLE, SINGLE = RESIDUALS.values()


def made(numbers: dict[str, list[int]], strength: float = 1.0) -> tuple[ControlCall, dict[str, list[Any]]]:
    """What a ControlNet gives; places of one number share a residual, which ComfyUI multiplies once."""
    call = ControlCall(cast(Any, None), {"x": torch.zeros(2, 16, 4, 4)})
    lists: dict[str, list[Any]] = {"middle": []}
    for kind, each in numbers.items():
        residuals = {number: Residual(call, kind, number) for number in each}
        for residual in residuals.values():
            residual *= strength
        lists[kind] = [residuals[number] for number in each]
    return call, lists


def added(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> dict[str, list[Any]]:
    found = {kind: list(each) for kind, each in one.items()}
    for kind, each in other.items():
        found[kind] = [a + b for a, b in zip(found.get(kind, []), each, strict=False)] or each
    return found


def test_a_stack_is_read_in_its_order_with_strengths_by_block() -> None:
    first, lists = made({"input": [0, 0, 1, 1], "output": [0, 0, 0]}, 0.5)
    second, others = made({"input": [0, 1, 2, 3]}, 0.25)
    faults: list[str] = []
    used = read_controls(added(lists, others), (2, 2), faults)
    assert faults == []
    assert [(each.call, each.number, each.scale) for each in used] == [(first, 0, 0.5), (second, 1, 0.25)]
    assert used[0].blocks == {DOUBLE: [0, 0], SINGLE: [0, 0]}
    assert used[1].blocks == {DOUBLE: [0, 1]}


def test_without_residuals_there_is_no_controlnet() -> None:
    faults: list[str] = []
    for control in (None, {}, {"input": [], "middle": [], "output": []}):
        assert read_controls(control, (2, 2), faults) == []
    assert faults == []


def test_what_other_nodes_make_of_residuals_is_a_fault() -> None:
    def broken(change: Any) -> Any:
        _, lists = made({"input": [0, 1], "output": [0, 1]})
        return change(lists) or lists

    changes = [
        lambda lists: lists["input"].__setitem__(0, torch.zeros(1)),
        lambda lists: lists["input"].__setitem__(1, None),
        lambda lists: lists["input"].pop(),  # fewer than the model has blocks
        lambda lists: lists["input"][0].__imul__(0.5) and None,  # one block alone
        lambda lists: lists["input"].reverse() or lists["input"].__setitem__(0, lists["output"][0]),
        lambda lists: lists.update(other=[lists["input"][0]]),
        lambda _: object(),
    ]
    for change in changes:
        faults: list[str] = []
        assert read_controls(broken(change), (2, 2), faults) == []
        assert faults == ["ControlNet whose residuals another node has changed"]
    with pytest.raises(TypeError):
        made({"input": [0]})[1]["input"][0] + torch.zeros(1)


def test_a_picture_is_kept_once_and_is_that_of_every_row() -> None:
    pictures, kept = KeptPictures(), []

    def keep(tensor: torch.Tensor) -> KeptTensor:
        kept.append(tensor)
        return KeptTensor(tensor)

    hint = torch.randn(1, 16, 4, 6)
    first = pictures.keep(hint, slice(0, 64), 1, keep)
    assert pictures.keep(hint, slice(0, 64), 1, keep) is first
    assert kept[0].shape == (1, 6, 64)
    both = pictures.keep(hint, slice(0, 64), 2, keep)
    assert isinstance(both, RowsOf)
    assert both.parts == ((first, 2),)
    assert len(kept) == 1
    hint += 1  # ComfyUI has written to it
    assert pictures.keep(hint, slice(0, 64), 1, keep) is not first
    of_rows = pictures.keep(torch.randn(3, 16, 4, 6), slice(1, 3), 2, keep)
    assert isinstance(of_rows, KeptTensor)
    assert of_rows.shape == (2, 6, 64)


def test_pictures_of_inference_mode_are_kept_by_content():
    """ComfyUI's executor makes them so, and torch counts no versions of them."""
    pictures, kept = KeptPictures(), []

    def keep(tensor: torch.Tensor) -> KeptTensor:
        kept.append(tensor)
        return KeptTensor(tensor)

    with torch.inference_mode():
        hint = torch.ones(1, 16, 4, 4)
        first = pictures.keep(hint, slice(0, 1), 1, keep)
        assert pictures.keep(hint, slice(0, 1), 1, keep) is first
        hint += 1
        assert pictures.keep(hint, slice(0, 1), 1, keep) is not first
    assert len(kept) == 2
