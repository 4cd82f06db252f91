"""Another process compiles graphs, and keeps them on disk; what goes wrong there leaves blocks eager."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attending_blocks import Model, arguments, made, swap

from xditd.gpu_workers.models import block_compiler, compiled_graphs
from xditd.gpu_workers.models.block_compiler import import_loaders
from xditd.gpu_workers.models.compiled_blocks import CompiledBlocks
from xditd.gpu_workers.models.compiled_graphs import CompiledGraphs
from xditd.ipc.errors import Unsupported


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def wait(blocks: CompiledBlocks, key: object, limit_s: float = 250.0) -> None:
    end = time.monotonic() + limit_s
    while blocks.state(key).phase == "making":
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.slow
def test_another_process_compiles_and_this_one_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_loaders()
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


def test_closing_ends_the_compiler_and_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graphs = CompiledGraphs(tmp_path, torch.device("cpu"))
    graphs.make({"any": b"{}"})
    end = time.monotonic() + 60
    while graphs._process is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    graphs.close()
    graphs.make({"later": b"{}"})
    assert graphs.find("later") is None
    assert not caplog.records


def test_the_compiler_ends_by_itself_while_its_parent_lives(tmp_path: Path) -> None:
    command = [sys.executable, "-m", block_compiler.__name__, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        assert (process.wait(60), said) == (0, b"")


def run(*_: torch.Tensor) -> Any:
    raise AssertionError("no graph is run here")


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

    def load(path: Path) -> Callable[..., Any]:
        if path.read_text() != "whole":
            raise ValueError("truncated")
        return run

    monkeypatch.setattr(compiled_graphs, "has_loaders", lambda: True)
    monkeypatch.setattr(compiled_graphs, "load", load)
    monkeypatch.setattr(CompiledGraphs, "_compile", compile_anew)
    graphs = CompiledGraphs(tmp_path, torch.device("cpu"))
    for name, content in (("good", "whole"), ("bad", "who")):
        (graphs.folder / name).mkdir()
        (graphs.folder / name / "artifact").write_text(content)
    assert loaded(graphs, "good", "bad") == ["made", "made"]


def test_what_goes_wrong_beside_graphs_leaves_them_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another daemon removes old graphs, too."""
    monkeypatch.setattr(compiled_graphs, "has_loaders", lambda: True)
    monkeypatch.setattr(compiled_graphs, "load", lambda _: run)
    monkeypatch.setattr(compiled_graphs, "MAX_ON_DISK", 1)
    graphs = CompiledGraphs(tmp_path, torch.device("cpu"))
    for name in ("used", "old"):
        (graphs.folder / name).mkdir()
        (graphs.folder / name / "artifact").touch()
    (graphs.folder / "old" / "graph.json").touch()
    (graphs.folder / "old" / "folder").mkdir()  # which cannot be removed as a file
    assert loaded(graphs, "used") == ["made"]


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompiledGraphs:
    """A graph that was asked for and is on disk, in a process that has not imported the compiler."""
    monkeypatch.setattr(compiled_graphs, "has_loaders", lambda: False)
    graphs = CompiledGraphs(tmp_path, torch.device("cpu"))
    assert not graphs.needs_imports
    (graphs.folder / "any").mkdir()
    (graphs.folder / "any" / "artifact").touch()
    graphs.make({"any": b"{}"})
    end = time.monotonic() + 60
    while not graphs.waits:
        assert time.monotonic() < end
        time.sleep(0.02)
    return graphs


def test_the_thread_that_runs_forwards_imports_the_compiler_before_another_one_loads(
    on_disk: CompiledGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []

    def note(what: str) -> Callable[..., Any]:
        return lambda *_: done.append((what, threading.current_thread().name))

    monkeypatch.setattr(compiled_graphs, "import_loaders", note("import"))
    monkeypatch.setattr(compiled_graphs, "load", note("load"))
    assert on_disk.needs_imports
    assert done == []
    on_disk.let_load()
    assert not on_disk.needs_imports
    on_disk.let_load()  # again, as after each command
    assert loaded(on_disk, "any") == ["made"]
    assert done == [("import", threading.current_thread().name), ("load", "compiled graphs")]
    assert not on_disk.waits


def test_a_compiler_that_cannot_be_imported_is_a_reason_and_leaves_graphs_on_disk(
    on_disk: CompiledGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ImportError("no compiler")

    monkeypatch.setattr(compiled_graphs, "import_loaders", missing)
    on_disk.let_load()
    assert loaded(on_disk, "any") == ["failed"]
    assert on_disk.find("any").reason == "ImportError: no compiler"
    assert (on_disk.folder / "any" / "artifact").exists()


def test_closing_ends_a_thread_that_waits_for_imports(on_disk: CompiledGraphs) -> None:
    on_disk.close()
    assert not on_disk.waits
    assert on_disk.find("any").phase == "making"


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(Unsupported, match="0700"):
        CompiledGraphs(tmp_path, torch.device("cpu"))
