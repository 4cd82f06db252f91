"""No module imports itself by way of others, in the package as it is installed: real folders in place of symlinks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# In a process of its own: here xditd is imported already, from behind the symlinks.
LIST_IMPORTS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import grimp
graph = grimp.build_graph("xditd", include_external_packages=False, exclude_type_checking_imports=False, cache_dir=None)
print(json.dumps({module: sorted(graph.find_modules_directly_imported_by(module)) for module in graph.modules}))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each module imports, also inside functions and for types alone."""
    folder = tmp_path_factory.mktemp("resolved")
    ignored = shutil.ignore_patterns("__pycache__", "node_modules")
    shutil.copytree(ROOT / ".pkg" / "xditd", folder / "xditd", symlinks=False, ignore=ignored)
    command = [sys.executable, "-c", LIST_IMPORTS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert "xditd.gpu_workers.models.registry" in found
    return found


def circles(imports: dict[str, list[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's algorithm, without recursion)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []
    for start in imports:
        work = [] if start in index else [(start, iter(imports[start]))]
        if work:
            index[start] = lowest[start] = len(index)
            stack.append(start)
        while work:
            module, rest = work[-1]
            for imported in rest:
                if imported not in index:
                    index[imported] = lowest[imported] = len(index)
                    stack.append(imported)
                    work.append((imported, iter(imports.get(imported, ()))))
                    break
                if imported in stack:
                    lowest[module] = min(lowest[module], index[imported])
            else:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[module])
                if lowest[module] == index[module]:
                    group = [stack.pop()]
                    while group[-1] != module:
                        group.append(stack.pop())
                    found.append(sorted(group))
    return [group for group in found if len(group) > 1]


def test_a_circle_is_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [["a", "b", "c"]]


def test_no_module_imports_itself_by_way_of_others(imports: dict[str, list[str]]) -> None:
    assert circles(imports) == []


@pytest.mark.parametrize("room", ["daemon", "gpu_workers", "ipc"])
def test_no_folder_of_a_room_imports_itself_by_way_of_others(imports: dict[str, list[str]], room: str) -> None:
    """Each folder counts as one: modules may be free of circles where their folders are not."""
    prefix = f"xditd.{room}."
    folders: dict[str, set[str]] = {}
    for module, imported in imports.items():
        if module.startswith(prefix):
            found = folders.setdefault(module.split(".")[2], set())
            found.update(name.split(".")[2] for name in imported if name.startswith(prefix))
    for folder, found in folders.items():
        found.discard(folder)
    assert len(folders) > 3
    assert circles({folder: sorted(found) for folder, found in folders.items()}) == []
