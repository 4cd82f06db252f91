"""Repeated blocks are recorded, compiled elsewhere and run with any weights; forwards stay as they were."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from attending_blocks import PLAN, SIZE, Block, Model, arguments, made, numbers, swap
from interpreted_graphs import InterpretedGraphs
from torch.nn import functional

from xditd.gpu_workers.models import compiled_blocks
from xditd.gpu_workers.models.block_graphs import NotCompiled
from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.token_plans import PlanFault, Split, TokenPlan
from xditd.gpu_workers.parallel.streams import Ranks


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def graphs() -> InterpretedGraphs:
    return InterpretedGraphs()


def test_blocks_share_one_graph_and_give_the_same_bits(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks, call = made(model, graphs), partial(model, **arguments())
    expected = call()
    assert torch.equal(blocks.begin("a", call), expected)
    assert len(graphs.made) == 1
    assert blocks.state("a").phase == "made"
    assert torch.equal(blocks.run("a", call), expected)
    assert (blocks.compiled, blocks.eager) == (3, 0)


def test_forwards_stay_as_they_were(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks, call = made(model, graphs), partial(model, **arguments())
    before = [set(vars(each)) for each in model.modules()]
    attention = functional.scaled_dot_product_attention
    blocks.begin("a", call)
    blocks.run("a", call)
    with pytest.raises(RuntimeError):
        blocks.run("a", lambda: model(numbers(1, 2, 3), numbers(1, 2, 3)))
    with pytest.raises(RuntimeError):
        blocks.begin("b", lambda: model(numbers(1, 2, 3), numbers(1, 2, 3)))
    assert [set(vars(each)) for each in model.modules()] == before
    assert functional.scaled_dot_product_attention is attention
    assert blocks.state("b").phase == "absent"
    call()
    assert (blocks.compiled, blocks.eager) == (3, 1)


def test_other_weights_use_the_same_graph(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks, call = made(model, graphs), partial(model, **arguments())
    first = blocks.begin("a", call)
    for seed in (1, 2):
        swap(model, seed)
        assert torch.equal(blocks.run("a", call), call())
        assert not torch.equal(call(), first)
    assert blocks.compiled == 6
    assert len(graphs.made) == 1


def test_calls_of_one_graph_take_their_own_weights(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks = made(model, graphs)
    calls = [partial(model, **arguments(), options=options) for options in (None, True)]
    for number, call in enumerate(calls):
        blocks.begin(number, call)
    for number, call in enumerate(calls):
        assert torch.equal(blocks.run(number, call), call())
    assert (blocks.compiled, len(graphs.made)) == (6, 1)


def test_weights_of_another_dtype_or_layout_run_eager(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks, call = made(model, graphs), partial(model, **arguments())
    blocks.begin("a", call)
    for block in model.blocks:
        held = block.out._parameters
        held["weight"] = torch.nn.Parameter(held["weight"].t().contiguous().t(), requires_grad=False)
    assert torch.equal(blocks.run("a", call), call())
    assert (blocks.compiled, blocks.eager) == (0, 3)


def test_calls_that_are_not_made_run_eager(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks = made(model, graphs)
    blocks.begin("a", partial(model, **arguments()))
    mask = torch.ones(1, 1, 5, 3, dtype=torch.bool)
    changed: list[dict[str, Any]] = [arguments(6), arguments(rows=2), arguments() | {"mask": mask}, {"options": 1}]
    for each in changed:
        call = partial(model, **(arguments() | each))
        assert torch.equal(blocks.run("a", call), call())
    assert (blocks.compiled, blocks.eager) == (0, 12)
    assert len(graphs.made) == 1


def test_shapes_masks_and_rows_have_graphs_of_their_own(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks = made(model, graphs)
    mask = torch.tensor([[[[True, False, True]]]])
    calls = [arguments(), arguments(7), arguments(rows=2), arguments() | {"mask": mask}]
    for number, each in enumerate(calls):
        blocks.begin(number, partial(model, **each))
    for number, each in enumerate(calls):
        assert torch.equal(blocks.run(number, partial(model, **each)), model(**each))
    assert (blocks.compiled, blocks.eager, len(graphs.made)) == (12, 0, 4)


def test_a_graph_that_is_not_made_yet_runs_eager() -> None:
    graphs = InterpretedGraphs(is_done=False)
    model = Model()
    blocks, call = made(model, graphs), partial(model, **arguments())
    blocks.begin("a", call)
    assert blocks.state("a").phase == "making"
    assert torch.equal(blocks.run("a", call), call())
    assert (blocks.compiled, blocks.eager) == (0, 3)


def test_the_number_of_keys_is_bounded(graphs: InterpretedGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_blocks, "MAX_KEYS", 2)
    model = Model()
    blocks = made(model, graphs)
    for tokens in (4, 5, 6):
        blocks.begin(tokens, partial(model, **arguments(tokens)))
    assert [blocks.state(each).phase for each in (4, 5, 6)] == ["made", "made", "absent"]
    monkeypatch.setattr(compiled_blocks, "IDLE_S", 0.0)
    blocks.run(4, partial(model, **arguments(4)))
    blocks.begin(6, partial(model, **arguments(6)))
    assert [blocks.state(each).phase for each in (4, 5, 6)] == ["made", "absent", "made"]


def test_tokens_are_split_around_graphs(graphs: InterpretedGraphs) -> None:
    model = Model()
    whole = model(**arguments())
    planned = PlannedModule(model, PLAN)
    blocks = made(model, graphs, planned)
    for rank, own in ((0, whole[:, :3]), (1, whole[:, 3:])):
        call = partial(planned.run, partial(model, **arguments()), Ranks(None, rank, 2))
        eager = blocks.begin(rank, call)
        assert torch.equal(blocks.run(rank, call), eager)
        torch.testing.assert_close(eager, own, rtol=1e-6, atol=1e-6)
    assert (blocks.compiled, blocks.eager) == (6, 0)
    # Whole calls of the same sizes are other calls.
    blocks.run("whole", partial(model, **arguments(3)))
    assert (blocks.compiled, blocks.eager) == (6, 3)


def test_a_plan_that_splits_inside_of_a_block_leaves_blocks_eager(graphs: InterpretedGraphs) -> None:
    model = Model()
    plan = TokenPlan(PLAN.splits, {"blocks.*.out": {0: Split("image")}}, PLAN.attentions)
    planned = PlannedModule(model, plan)
    blocks = made(model, graphs, planned)
    with pytest.raises((RuntimeError, ValueError)):  # one process alone cannot gather
        blocks.begin("a", partial(planned.run, partial(model, **arguments()), Ranks(None, 0, 2)))
    whole = partial(model, **arguments())
    blocks.begin("whole", whole)
    assert torch.equal(blocks.run("whole", whole), whole())
    assert blocks.compiled == 3
    assert "inside of a block" in blocks._split_fault


def test_a_fault_of_a_plan_is_that_of_the_eager_forward(graphs: InterpretedGraphs) -> None:
    model = Model()
    planned = PlannedModule(model, PLAN)
    blocks = made(model, graphs, planned)
    call = partial(planned.run, partial(model, **arguments()), Ranks(None, 0, 2))
    blocks.begin("a", call)
    for name in graphs.made:
        compute = graphs.made[name].function
        assert compute is not None

        def twice(*given: torch.Tensor, compute: Any = compute) -> Any:
            compute(*given)
            return compute(*given)

    graphs.run_instead(twice)
    with pytest.raises(PlanFault, match="computes more"):
        blocks.run("a", call)


def fail(*_: torch.Tensor) -> Any:
    raise AssertionError("expected size 3,\nstride 4")


def test_a_graph_that_fails_is_not_used_again(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks, call = made(model, graphs), partial(model, **arguments())
    blocks.begin("a", call)
    graphs.run_instead(fail)
    assert torch.equal(blocks.run("a", call), call())
    assert (blocks.compiled, blocks.eager) == (0, 3)
    state = blocks.state("a")
    assert state.phase == "failed"
    assert "AssertionError" in state.reason
    assert "\n" not in state.reason


def test_a_graph_that_fails_after_ranks_exchanged_ends_the_forward(graphs: InterpretedGraphs) -> None:
    model = Model()
    planned = PlannedModule(model, PLAN)
    blocks = made(model, graphs, planned)
    call = partial(planned.run, partial(model, **arguments()), Ranks(None, 0, 2))
    expected = blocks.begin("a", call)
    (compute,) = (each.function for each in graphs.made.values())
    assert compute is not None
    graphs.run_instead(lambda *given: fail(*compute(*given)))
    with pytest.raises(NotCompiled):
        blocks.run("a", call)
    assert torch.equal(blocks.run("a", call), expected)


def read(_: Block, x: torch.Tensor) -> None:
    float(x.sum())


def write(_: Block, x: torch.Tensor) -> None:
    x.add_(1)


def draw(_: Block, x: torch.Tensor) -> None:
    torch.rand_like(x)


ELSEWHERE = torch.ones(SIZE)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (read, "reads values of tensors"),
        (write, "writes to its arguments"),
        (draw, "draws random numbers"),
        (lambda block, x: x + ELSEWHERE, "no argument of it and not its own"),
        (lambda block, x: vars(block).update(calls=x), "changes its attributes|attributes of a block"),
        (lambda block, x: x.new_tensor([1.0, 2.0]), "makes a tensor of values|no argument of it"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(graphs: InterpretedGraphs, extra: Any, reason: str) -> None:
    model = Model(extra=extra)
    blocks = made(model, graphs)
    expected = model(**arguments())
    assert torch.equal(blocks.begin("a", partial(model, **arguments())), expected)
    assert blocks.state("a").phase == "failed"
    assert re.search(reason, blocks.state("a").reason)
    assert torch.equal(blocks.run("a", partial(model, **arguments())), expected)
    assert not graphs.made


def test_attributes_that_a_forward_sets_are_refused(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks, call = made(model, graphs), partial(model, **arguments())
    for block in model.blocks:
        block.attn.scale = 0.5
    blocks.begin("a", call)
    assert blocks.state("a").reason == "the attributes of a block are changed during a forward"


def test_objects_among_arguments_are_refused(graphs: InterpretedGraphs) -> None:
    model = Model()
    blocks = made(model, graphs)
    call = partial(model, **arguments(), options=object())
    blocks.begin("a", call)
    assert blocks.state("a").reason == "a block takes an argument of the type object"
    assert torch.equal(blocks.run("a", call), call())


def test_gradients_leave_blocks_eager(graphs: InterpretedGraphs) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        model = Model()
        blocks, call = made(model, graphs), partial(model, **arguments())
        blocks.begin("a", call)
        assert blocks.state("a").reason == "gradients are enabled"
        blocks.run("a", call)
    assert (blocks.compiled, blocks.eager) == (0, 0)


class LoraLinear(torch.nn.Linear):
    """As a layer of the package that makes LoRA layers."""


LoraLinear.__module__ = "peft.tuners.lora.layer"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "training mode"),
        (lambda model: model.blocks[1].out.register_forward_hook(print), "has hooks"),
        (lambda model: vars(model.blocks[1].attn).update(forward=print), "is changed"),
        (lambda model: setattr(model.blocks[1], "out", LoraLinear(SIZE, SIZE).eval()), "LoRA"),
        (lambda model: setattr(model.blocks[1], "gradient_checkpointing", True), "gradient checkpointing"),
        (lambda model: setattr(model, "blocks", model.blocks[:1]), "no repeated blocks"),
    ],
)
def test_a_module_that_cannot_be_compiled_has_a_reason(graphs: InterpretedGraphs, change: Any, reason: str) -> None:
    model = Model()
    change(model)
    found = CompiledBlocks.of(model, None, graphs)
    assert isinstance(found, str)
    assert reason in found


def test_hooks_on_blocks_themselves_run(graphs: InterpretedGraphs) -> None:
    model = Model()
    model.blocks[1].register_forward_hook(lambda _, __, result: (result[0] + 1, result[1]))
    blocks, call = made(model, graphs), partial(model, **arguments())
    expected = call()
    blocks.begin("a", call)
    assert torch.equal(blocks.run("a", call), expected)
    assert blocks.compiled == 3
