"""Repeated blocks are recorded, compiled elsewhere and run with any weights; forwards stay as they were."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_graphs import InterpretedGraphs
from torch.nn import functional

from xditd.gpu_workers.models import compiled_blocks, compiled_graphs
from xditd.gpu_workers.models.block_compiler import prepare
from xditd.gpu_workers.models.block_graphs import NotCompiled
from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.token_plans import Attention, PlanFault, Split, TokenPlan
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.ipc.errors import Unsupported

SIZE = 16
HEADS = 2
CLASSES = (
    "ChromaTransformer2DModel",
    "CogView4Transformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "Lumina2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
)
"""Those that are compiled; of all others, torch runs the graphs operation by operation."""


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_query = torch.nn.Linear(SIZE, SIZE)
        self.processor = None

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        query, key = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.to_query(x), context))
        return functional.scaled_dot_product_attention(query, key, key, mask).transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    """``extra`` is more that its forward does."""

    def __init__(self, extra: Callable[[Block, torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.attn = Attending()
        self.out = torch.nn.Linear(SIZE, SIZE)
        self.other = torch.nn.Linear(SIZE, SIZE)
        self.dropout = torch.nn.Dropout(0.5)
        self.table = torch.ones(SIZE)
        self.extra = extra

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None, options: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.extra is not None:
            self.extra(self, x)
        x = x + self.attn(x, context, mask)
        return x + self.table * self.dropout(functional.silu((self.other if options else self.out)(x))), context


class Model(torch.nn.Module):
    """Blocks with the tokens of an image, which attend to a text."""

    def __init__(self, blocks: int = 3, extra: Callable[[Block, torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(extra) for _ in range(blocks)])
        self.eval().requires_grad_(False)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None, options: Any = None
    ) -> torch.Tensor:
        for block in self.blocks:
            image, text = block(image, text, mask, options=options)
        return image


PLAN = TokenPlan(
    splits={"": {"image": Split("image")}},
    gathers={},
    attentions={"blocks.*.attn": Attention(queries=("image",), keys=())},
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(tokens: int = 5, rows: int = 1) -> dict[str, torch.Tensor]:
    return {"image": numbers(rows, tokens, SIZE), "text": numbers(rows, 3, SIZE, seed=1)}


def swap(model: torch.nn.Module, seed: int) -> None:
    """Give a model other weights, as a plug does: other tensors in place of its own."""
    for module in model.modules():
        for name, each in module._parameters.items():
            module._parameters[name] = torch.nn.Parameter(numbers(*each.shape, seed=seed) * 0.2, requires_grad=False)


def made(model: torch.nn.Module, graphs: Any, planned: PlannedModule | str | None = None) -> CompiledBlocks:
    found = CompiledBlocks.of(model, planned, graphs)
    assert isinstance(found, CompiledBlocks), found
    return found


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


# --- Compiled by torch's compiler ------------------------------------------------------------------


def wait(blocks: CompiledBlocks, key: object, limit_s: float = 250.0) -> None:
    end = time.monotonic() + limit_s
    while blocks.state(key).phase == "making":
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.slow
def test_another_process_compiles_and_this_one_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare()
    torch._dynamo.utils.counters["frames"].clear()  # other tests of this process compile, too
    traced: list[object] = []
    monkeypatch.setattr(torch.fx.Tracer, "trace", lambda *given, **_: traced.append(given))
    model = Model()
    call = partial(model, **arguments())
    graphs = CompiledGraphs(tmp_path / "graphs", torch.device("cpu"))
    blocks = made(model, graphs)
    blocks.begin("a", call)
    assert blocks.state("a").phase == "making"
    assert torch.equal(blocks.run("a", call), call())
    wait(blocks, "a")
    assert blocks.state("a").phase == "made", blocks.state("a")
    before = blocks.compiled
    for seed in (0, 1, 2):
        if seed:
            swap(model, seed)
        torch.testing.assert_close(blocks.run("a", call), call(), rtol=1e-6, atol=1e-6)
    assert blocks.compiled == before + 9
    graphs.close()
    # A restart finds it on disk.
    again = CompiledGraphs(tmp_path / "graphs", torch.device("cpu"))
    restarted = made(model, again)
    restarted.begin("a", call)
    wait(restarted, "a")
    torch.testing.assert_close(restarted.run("a", call), call(), rtol=1e-6, atol=1e-6)
    assert restarted.compiled == 3
    assert all(state.was_on_disk for state in again._states.values())
    again.close()
    assert not traced
    assert not torch._dynamo.utils.counters["frames"]


@pytest.mark.slow
def test_what_the_compiler_refuses_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = CompiledGraphs(tmp_path, torch.device("cpu"))
    graphs.make({"unreadable": b'{"inputs": []}'})
    end = time.monotonic() + 250
    while (state := graphs.find("unreadable")) is None or state.phase == "making":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert state.phase == "failed"
    assert "KeyError" in state.reason
    monkeypatch.setattr(compiled_graphs, "_COMPILER", "no_such_module")
    graphs.make({"lost": b"{}"})
    while (state := graphs.find("lost")) is None or state.phase == "making":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert state.reason == "the compiler's process ended with status 1"
    graphs.close()


def test_closing_ends_the_compiler(tmp_path: Path) -> None:
    graphs = CompiledGraphs(tmp_path, torch.device("cpu"))
    graphs.make({"any": b"{}"})
    graphs.close()
    graphs.make({"later": b"{}"})
    assert graphs.find("later") is None


def loaded(graphs: CompiledGraphs, *names: str) -> list[str]:
    """Ask for graphs; return how far each is in the end."""
    graphs.make(dict.fromkeys(names, b"{}"))
    end = time.monotonic() + 60
    while any(graphs.find(each).phase == "making" for each in names):
        assert time.monotonic() < end
        time.sleep(0.02)
    graphs.close()
    return [graphs.find(each).phase for each in names]


def test_a_graph_on_disk_that_cannot_be_read_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_anew(graphs: CompiledGraphs, names: list[str]) -> list[str]:
        for name in names:
            assert not (graphs.folder / name / "artifact").exists()
            (graphs.folder / name / "artifact").write_text("whole")
            graphs._finish(name, 0.0)
        return []

    def load(path: Path) -> Callable:
        if path.read_text() != "whole":
            raise ValueError("truncated")
        return fail

    monkeypatch.setattr(compiled_graphs, "prepare", lambda: None)
    monkeypatch.setattr(compiled_graphs, "load", load)
    monkeypatch.setattr(CompiledGraphs, "_compile", compile_anew)
    graphs = CompiledGraphs(tmp_path, torch.device("cpu"))
    for name, content in (("good", "whole"), ("bad", "who")):
        (graphs.folder / name).mkdir()
        (graphs.folder / name / "artifact").write_text(content)
    assert loaded(graphs, "good", "bad") == ["made", "made"]


def test_what_goes_wrong_beside_graphs_leaves_them_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another daemon removes old graphs, too."""
    monkeypatch.setattr(compiled_graphs, "prepare", lambda: None)
    monkeypatch.setattr(compiled_graphs, "load", lambda _: fail)
    monkeypatch.setattr(compiled_graphs, "MAX_ON_DISK", 1)
    graphs = CompiledGraphs(tmp_path, torch.device("cpu"))
    for name in ("used", "old"):
        (graphs.folder / name).mkdir()
        (graphs.folder / name / "artifact").touch()
    (graphs.folder / "old" / "graph.json").touch()
    (graphs.folder / "old" / "folder").mkdir()  # which cannot be removed as a file
    assert loaded(graphs, "used") == ["made"]


def test_a_compiler_that_cannot_be_imported_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no compiler")

    monkeypatch.setattr(compiled_graphs, "prepare", missing)
    graphs = CompiledGraphs(tmp_path, torch.device("cpu"))
    assert loaded(graphs, "any") == ["failed"]


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(Unsupported, match="0700"):
        CompiledGraphs(tmp_path, torch.device("cpu"))


# --- Classes of diffusers -------------------------------------------------------------------------


def run_ranks(out: Path, ranks: int, folder: str, *classes: str) -> dict[str, dict[str, dict[str, Any]]]:
    tests = Path(__file__).parents[2]
    support = os.pathsep.join(str(tests / each) for each in ("models/support", "gpu_workers/support"))
    environment = os.environ | {"PYTHONPATH": support, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = Path(__file__).with_name("compiled_ranks.py")
    command = [sys.executable, str(program), str(out), str(ranks), folder, *classes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(out.read_text())
    return found


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_graphs_of_all_classes_give_the_bits_of_their_forwards(tmp_path: Path, ranks: int) -> None:
    found = run_ranks(tmp_path / "found.json", ranks, "-")
    compiled = 0
    for key, calls in found.items():
        for name, each in calls.items():
            if "error" not in each:
                assert each["reason"], (key, name)
                continue
            assert each["error"] == 0.0, (key, name, each)
            assert each["is_recorded_alike"], (key, name)
            assert each["is_eager_again"], (key, name)
            assert each["compiled"] or each["reason"], (key, name, each)
            compiled += not each["eager"]
    assert compiled > (150 if ranks == 1 else 100)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_classes_give_what_their_forwards_give(tmp_path: Path, ranks: int) -> None:
    found = run_ranks(tmp_path / "found.json", ranks, str(tmp_path / "graphs"), *CLASSES)
    assert {key.partition("-")[0] for key in found} == set(CLASSES)
    for key, calls in found.items():
        for name, each in calls.items():
            if "error" in each:
                assert each["error"] <= 1e-6, (key, name, each)
                assert each["is_eager_again"], (key, name)
        assert any(each.get("compiled") and not each["eager"] for each in calls.values()) or "kv_" in key, key
