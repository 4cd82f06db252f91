"""What lends need is imported between commands, one module at a time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from xditd.gpu_workers.models import registry
from xditd.gpu_workers.process import late_imports, lean_imports, preload
from xditd.gpu_workers.process.late_imports import QUIET_S, LateImports
from xditd.ipc.errors import Unsupported


class Cycle:
    """Garbage that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


class Graphs:
    """Compiled graphs that were asked for, before or after one of them waits to be loaded."""

    def __init__(self, *, waits: bool) -> None:
        self.needs_imports, self.waits = True, waits

    def let_load(self) -> None:
        self.needs_imports = self.waits = False


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(preload, "FOR_LENDS", ("first", "second"))
    monkeypatch.setattr(preload, "AFTER_LENDS", ("later", "part"))
    monkeypatch.setattr(late_imports, "FOR_GRAPHS", ("part", "whole"))
    monkeypatch.setattr(lean_imports, "is_imported", lambda name: name in found)
    monkeypatch.setattr(preload, "import_all", lambda names: found.extend(names))
    monkeypatch.setattr(preload, "import_family", lambda family: found.append(family.name))
    monkeypatch.setattr(preload.registry, "own_families", lambda: [_Family("one"), _Family("two")])
    return found


class _Family:
    def __init__(self, name: str) -> None:
        self.name = name


def test_each_step_imports_one_module_until_none_is_left(imported: list[str]) -> None:
    imports = LateImports()
    seen = []
    while imports.wait_s is not None:
        assert imports.wait_s == 0.0
        imports.run_next()
        seen.append(len(imported))
    assert imported == ["first", "second", "one", "two", *registry.DESCRIBED, *preload.AFTER_LENDS]
    described = 4 + len(registry.DESCRIBED)
    after = range(described + 1, len(imported) + 1)
    assert seen == [1, 2, 2, 3, 4, described, *after]  # the third lists the families
    imports.run_next()  # nothing is left


def test_a_lend_imports_what_all_lends_need_at_once(imported: list[str]) -> None:
    imports = LateImports()
    imports.note_command()
    imports.finish_for_lend()
    assert imported == ["first", "second", "one", "two", *registry.DESCRIBED]
    imports.finish_for_lend()  # nothing is left of it
    assert len(imported) == 4 + len(registry.DESCRIBED)
    assert imports.wait_s


def test_no_module_is_imported_soon_after_a_command(imported: list[str]) -> None:
    now = [100.0]
    imports = LateImports(clock=lambda: now[0])
    imports.note_command()
    assert imports.wait_s == pytest.approx(QUIET_S)
    imports.run_next()
    assert imported == []
    now[0] += QUIET_S
    assert imports.wait_s == 0.0
    imports.run_next()
    assert imported == ["first"]


def finish(imports: LateImports) -> None:
    while imports.wait_s is not None:
        imports.run_next()


def test_what_compiled_blocks_need_comes_last_where_any_block_may_be_compiled(imported: list[str]) -> None:
    finish(LateImports(compiles=True))
    assert imported[-3:] == ["later", "part", "whole"]


@pytest.mark.parametrize("waits", [False, True])
def test_what_compiled_blocks_need_comes_first_once_they_are_asked_for(imported: list[str], waits: bool) -> None:
    now, found = [100.0], []
    imports = LateImports(lambda: found[0] if found else None, clock=lambda: now[0])
    imports.finish_for_lend()
    imported.clear()
    found.append(graphs := Graphs(waits=waits))  # by a job
    imports.note_command()
    imports.run_next()
    assert imported == (["part"] if waits else [])  # commands that never pause do not keep graphs from loading
    now[0] += QUIET_S
    while graphs.needs_imports:
        imports.run_next()
    assert imported == ["part", "whole"]
    finish(imports)
    assert imported == ["part", "whole", "later", "part"]


def test_graphs_load_at_once_where_all_is_imported(imported: list[str]) -> None:
    found: list[Graphs] = []
    imports = LateImports(lambda: found[0] if found else None, compiles=True)
    finish(imports)
    found.append(graphs := Graphs(waits=False))
    assert imports.wait_s == 0.0  # whether or not its job has an answer
    imports.note_command()
    imports.run_next()
    assert not graphs.needs_imports
    assert imports.wait_s is None


def test_garbage_of_commands_is_not_kept_with_the_modules(imported: list[str]) -> None:
    garbage = weakref.ref(Cycle())
    try:
        LateImports().run_next()
        assert garbage() is None
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_what_cannot_be_imported_is_left_to_whoever_needs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A version of a library without one of the modules, two that do not fit each other, and a broken family."""
    (tmp_path / "unfit_module.py").write_text("raise ValueError('numpy.dtype size changed')")
    monkeypatch.syspath_prepend(tmp_path)

    def refuse(family: Any) -> None:
        raise Unsupported(f"{family.name} is broken")

    monkeypatch.setattr(preload, "FOR_LENDS", ("diffusers.no_such_module", "unfit_module"))
    monkeypatch.setattr(late_imports.registry, "operations_of", refuse)
    imports = LateImports()
    try:
        while imports.wait_s is not None:
            imports.run_next()
    finally:
        gc.unfreeze()
    assert "module=diffusers.no_such_module" in caplog.text
    assert "module=unfit_module error=ValueError: numpy.dtype size changed" in caplog.text
    assert "family=flux1 error=Unsupported: flux1 is broken" in caplog.text
