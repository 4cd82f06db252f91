"""Rules for every Python file of the project that no import contract can express."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Modules that run code found in the bytes that they load."""

HARMLESS = {("pickle", "PickleBuffer")}
"""A view of bytes that Ray sends without a copy: it loads nothing."""

PLAIN_ROOMS = {"client", "daemon", "gpu_workers", "ipc"}
"""Imported without ``xditd.``, a room is loaded twice, and its classes are not the ones that others raise."""

BANNED_CALLS = {"eval", "exec"}

BANNED_QUALIFIED = {("torch", "load"), ("torch", "hub")}

BANNED_ATTRIBUTES = {
    # torch.distributed pickles what these carry
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
    # and so does pyzmq
    "recv_pyobj",
    "send_pyobj",
}


def offences(source: str) -> Iterator[str]:
    """Name each breach of the rules as ``line: what``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _import_offences(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if any((node.module, alias.name) not in HARMLESS for alias in node.names):
                yield from _import_offences(node.lineno, node.module)
            for alias in node.names:
                if alias.name in BANNED_ATTRIBUTES or (node.module, alias.name) in BANNED_QUALIFIED:
                    yield f"{node.lineno}: from {node.module} import {alias.name}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
            yield f"{node.lineno}: {node.func.id}(...)"
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if node.attr in BANNED_ATTRIBUTES or (owner, node.attr) in BANNED_QUALIFIED:
                yield f"{node.lineno}: {ast.unparse(node)}"


def _import_offences(line: int, module: str) -> Iterator[str]:
    top = module.partition(".")[0]
    if top in UNPICKLERS:
        yield f"{line}: import {module}"
    if top in PLAIN_ROOMS:
        yield f"{line}: import {module} (write xditd.{module})"


def python_files() -> list[Path]:
    """List what git tracks or would add; in an unpacked source archive, everything but environments."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]


def test_no_file_breaks_the_rules() -> None:
    files = python_files()
    assert Path(__file__).resolve() in files
    found = [f"{path.relative_to(ROOT)}:{offence}" for path in files for offence in offences(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from pickle import PickleBuffer, loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "def f():\n    exec('1')",
        "import torch.distributed as dist\ndist.broadcast_object_list([])",
        "from torch.distributed import broadcast_object_list",
        "socket.recv_pyobj()",
        "import ipc",
        "from ipc.errors import BadRequest",
        "import daemon.leases",
        "from client import Client",
        "import gpu_workers",
    ],
)
def test_each_rule_catches_its_breach(source: str) -> None:
    assert len(list(offences(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from xditd.ipc import errors",
        "import xditd.client",
        "model.eval()",
        "import os\nos.execv('x', ['x'])",
        "safetensors.torch.load_file('x')",
        "import client_library",
        "'pickle'",
        "from pickle import PickleBuffer",
    ],
)
def test_rules_leave_good_code_alone(source: str) -> None:
    assert not list(offences(source))
