"""Limits on memory and processes are read from control groups of both versions, and named with their remedy."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from xditd.ipc import host_limits

VERSION_1 = "8:pids:/service\n4:cpu,memory:/user/service\n0::/\n"
VERSION_2 = "0::/user/service\n"
MEMORY = "memory.limit_in_bytes"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of control groups, with none in it; no limits on resources."""
    monkeypatch.setattr(host_limits, "_MOUNTS", tmp_path)
    monkeypatch.setattr(host_limits, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        {"cgroup": VERSION_2, "user/service/memory.max": "max\n", "user/memory.max": "2147483648\n"},
        {"cgroup": VERSION_2, "user/service/memory.max": "2147483648\n", "user/memory.max": "4294967296\n"},
        {"cgroup": VERSION_1, f"memory/{MEMORY}": f"{2**63 - 4096}\n", f"memory/user/{MEMORY}": "2147483648\n"},
    ],
    ids=["of a group above", "of its own", "version 1"],
)
def test_the_smallest_limit_on_memory_is_named(groups: Path, files: dict[str, str]) -> None:
    write(groups, files)
    assert host_limits.describe_memory() == "2.00 GiB for its control group (memory.max)"
    assert "killed; allowed are 2.00 GiB for its control group (memory.max); free" in host_limits.without_memory(
        "killed"
    )


def test_without_limits_none_are_named(groups: Path) -> None:
    write(groups, {"cgroup": VERSION_1, f"memory/user/service/{MEMORY}": f"{2**63 - 4096}\n", "pids/pids.max": "max\n"})
    assert host_limits.describe_memory() == host_limits.describe_tasks() == ""
    assert host_limits.without_threads("why").startswith("no process or thread can be started: why; raise the limit")


def test_without_a_control_group_nothing_is_read(groups: Path) -> None:
    assert not (groups / "cgroup").exists()
    assert host_limits.describe_tasks() == ""
    assert host_limits.count_memory_kills() == 0


@pytest.mark.parametrize(
    "files",
    [
        {"cgroup": VERSION_2, "user/service/memory.events": "low 0\noom 1\noom_kill 7\n"},
        {"cgroup": VERSION_1, "memory/user/service/memory.oom_control": "under_oom 0\noom_kill 7\n"},
    ],
    ids=["version 2", "version 1"],
)
def test_ends_for_want_of_memory_are_counted(groups: Path, files: dict[str, str]) -> None:
    write(groups, files)
    assert host_limits.count_memory_kills() == 7


def test_a_kill_is_explained_by_memory_where_the_count_has_risen(groups: Path) -> None:
    write(groups, {"cgroup": VERSION_2, "user/service/memory.events": "oom_kill 7\n"})
    assert host_limits.explain_kill(7) == ""
    assert host_limits.explain_kill(6).startswith("out of host memory: the kernel has ended processes of this control")
