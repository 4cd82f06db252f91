"""Every change of a recorded model's modules is found and named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from xditd.client.comfyui.baseline import Baseline
from xditd.client.comfyui.naming import name_of


@dataclass
class Params:
    guidance: bool = True
    axes: list[int] = field(default_factory=lambda: [8, 12])
    made_by: object = None


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.axes = [8, 12]
        self.params = Params()
        self.linear = torch.nn.Linear(2, 2, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x)
        return found


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loaded_bytes = 0
        self.sampling = torch.nn.Identity()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    @torch.no_grad()
    def apply_model(self) -> None: ...

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        yield


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def baseline(model) -> Baseline:
    return Baseline(model, without=("sampling",))


def test_what_was_made_has_no_differences(model, baseline):
    assert baseline.is_intact(model)
    assert baseline.differences(model) == []
    assert baseline.differences(Model()) == []
    assert baseline.foreign_methods() == []


def test_what_comfyui_keeps_is_no_difference(model, baseline):
    model.loaded_bytes = 7
    model.sampling = torch.nn.Linear(1, 1)
    model.blocks[0].comfy_cast_weights = True
    model.blocks[0].weight_function = []
    assert baseline.differences(model) == []
    assert not baseline.is_intact(model)  # not sure; the full check finds no change
    baseline.accept(model)
    assert baseline.is_intact(model)


def replace_block(model: Any) -> None:
    model.blocks[1] = torch.nn.Identity()


def replace_linear(model: Any) -> None:
    model.blocks[0].linear = torch.nn.Sequential()


def replace_forward(model: Any) -> None:
    model.blocks[0].forward = print


def replace_method(model: Any) -> None:
    model.apply_model = print


def hook(model: Any) -> None:
    model.blocks[0].linear.register_forward_hook(print)


def pre_hook(model: Any) -> None:
    model.blocks[0].register_forward_pre_hook(print)


def add(model: Any) -> None:
    model.blocks.append(torch.nn.Identity())


def remove(model: Any) -> None:
    del model.blocks[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace_block, "the module blocks.1 was replaced by Identity"),
        (replace_linear, "the module blocks.0.linear was replaced by Sequential"),
        (replace_forward, "blocks.0.forward was replaced (print)"),
        (replace_method, "apply_model was replaced (print)"),
        (hook, "the module blocks.0.linear has a forward hook (print)"),
        (pre_hook, "the module blocks.0 has a forward hook (print)"),
        (add, "the module blocks.2 was added (Identity"),
        (remove, "the module blocks.1 is missing"),
    ],
)
def test_a_change_is_seen_at_once_and_named(change, said, model, baseline):
    change(model)
    assert not baseline.is_intact(model)
    assert any(said in each for each in baseline.differences(model))


def test_a_setting_that_was_changed(model, baseline):
    model.blocks[1].heads = 4
    assert baseline.differences(model) == ["blocks.1.heads was changed from 2 to 4"]


def test_settings_that_are_lists_or_records(model, baseline):
    first, second = model.blocks
    first.axes = [10, 10]
    second.axes[0] = 4
    second.params.guidance = False
    second.params.axes.append(2)
    second.params.made_by = model
    assert baseline.differences(model) == [
        "blocks.0.axes was changed from [8, 12] to [10, 10]",
        "blocks.1.axes was changed from [8, 12] to [4, 12]",
        "blocks.1.params.guidance was changed from True to False",
        "blocks.1.params.axes was changed from [8, 12] to [8, 12, 2]",
    ]


def test_a_function_of_the_weights_that_is_not_comfyuis(model, baseline):
    own = type("LowVramPatch", (), {"__module__": "comfy.model_patcher", "__call__": print})()
    model.blocks[0].linear.weight_function = [own]
    assert baseline.differences(model) == []
    model.blocks[0].linear.bias_function = [own, print]
    assert baseline.differences(model) == ["blocks.0.linear.bias_function was set (print)"]


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_hook_on_all_modules(kind, model, baseline):
    handle = getattr(torch.nn.modules.module, f"register_module_{kind}")(print)
    try:
        assert not baseline.is_intact(model)
        assert baseline.differences(model) == ["all modules have a forward hook (print)"]
    finally:
        handle.remove()
    assert baseline.is_intact(model)


def test_a_method_of_a_class(model, baseline, monkeypatch):
    monkeypatch.setattr(Block, "forward", lambda self, x: x)
    assert not baseline.is_intact(model)
    assert "Block.forward is that of" in baseline.differences(model)[0]


def test_a_method_that_a_class_had_been_given_before(monkeypatch):
    namespace: dict[str, Any] = {"__name__": "another_pack"}
    made: Callable[..., Any] = type(name_of)(name_of.__code__, namespace, "forward")
    monkeypatch.setattr(Block, "forward", made)
    assert Baseline(Model()).foreign_methods() == ["Block.forward is that of name_of of another_pack"]


def test_places_that_a_patcher_changes_for_a_time(model, baseline):
    model.apply_model = print
    assert baseline.differences(model, {"apply_model": None}) == []


class SomeNode:
    def patch(self) -> Callable[[], None]:
        def inner() -> None: ...

        return inner


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (SomeNode().patch(), "SomeNode of test_baseline"),
        (SomeNode().patch, "SomeNode.patch of test_baseline"),
        (SomeNode(), "SomeNode of test_baseline"),
        (SomeNode, "SomeNode of test_baseline"),
        (print, "print"),
        ([], "list"),
    ],
)
def test_names(thing, name):
    assert name_of(thing) == name
