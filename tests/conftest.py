"""What every test shares: no network, and hardware markers that skip where the hardware is not."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from forked_programs import fork_program
from running_daemon import RunningDaemon, start_daemon, until_empty

__all__ = ["fork_program", "start_daemon"]

PROCESSES = 2
"""What ``pytest -n auto`` runs the tests in: many wait for processes of their own, of which some have two ranks."""
SHARED_DAEMONS = ("tests/end_to_end/", "tests/models/")
"""Folders whose tests share daemons with real workers, which take seconds to start, and processor time while idle."""

# Also for a bare `pytest`: a test that would download must fail instead. Child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"


@cache
def gpu_count() -> int:
    """Count NVIDIA GPUs through the driver's management library, without opening a context on any."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a machine with GPUs run the tests that share a daemon on them: ``pytest --daemon-device cuda tests/...``."""
    parser.addoption(
        "--daemon-device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the two workers of the daemon that end-to-end tests share run; with one GPU there is one",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Leave what is imported out of garbage collections, also of those of the tests: they would visit it every time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for GPUs that this machine does not have; import torch only if there are such tests."""
    for item in items:
        needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
        if needed and gpu_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPU(s), found {gpu_count()}"))
    if "torch" in sys.modules:
        # More threads make models this small slower, and many times slower where other processes use the cores.
        sys.modules["torch"].set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Run the tests one after another where they share a GPU, whose memory some of them fill or measure."""
    return 0 if Path("/dev/nvidiactl").exists() else PROCESSES


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole files, or whole :data:`SHARED_DAEMONS`; those with the most tests come first."""
    from xdist.scheduler import LoadFileScheduling

    class WholeFolders(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next(filter(nodeid.startswith, SHARED_DAEMONS), None) or super()._split_scope(nodeid)

    return WholeFolders(config, log)


@pytest.fixture(autouse=True)
def same_attention_backend() -> Iterator[None]:
    """Restore the attention backend of diffusers: a model's ``set_attention_backend`` sets it for the whole process."""

    def registry() -> Any:
        module = sys.modules.get("diffusers.models.attention_dispatch")
        return None if module is None else module._AttentionBackendRegistry

    before = registry()
    active = None if before is None else before._active_backend
    yield
    after = registry()
    if after is not None and before is not None:
        after._active_backend = active
    elif after is not None:
        after._active_backend = sys.modules["diffusers.models.attention_dispatch"].AttentionBackendName.NATIVE


@pytest.fixture
def convolutions_of_workers() -> Iterator[None]:
    """Convolve as workers on this CPU do, whose results in half precision are compared with those of this process."""
    from torch.nn import functional

    from xditd.gpu_workers.process import cpu_convolutions

    before = {name: getattr(functional, name) for name in cpu_convolutions.NAMES}
    cpu_convolutions.install(cpu_convolutions.slow_dtypes())
    yield
    for name, convolve in before.items():
        setattr(functional, name, convolve)


class OtherProcess:
    """A process that runs ``other_process.py``: ``ask`` it to share, map, read and write memory."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("other_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.identity: dict[str, int] = self.ask("identify")

    def ask(self, op: str, **arguments: Any) -> Any:
        """Have one thing done; a refusal comes back as ``{"code": ..., "detail": ...}``."""
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the other process died at {op}"
        found = json.loads(answer)
        return found.get("value") if "value" in found else found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def spawn_other() -> Iterator[Callable[[], OtherProcess]]:
    """Start further processes, which the test may kill."""
    spawned: list[OtherProcess] = []

    def spawn() -> OtherProcess:
        spawned.append(OtherProcess())
        return spawned[-1]

    yield spawn
    for other in spawned:
        if other.process.poll() is None:
            other.kill()


@pytest.fixture(scope="session")
def other_process() -> Iterator[OtherProcess]:
    """One process for the whole session: importing torch is what costs."""
    other = OtherProcess()
    yield other
    other.kill()


@pytest.fixture(scope="session")
def one_worker(start_daemon: Callable[..., RunningDaemon]) -> Iterator[RunningDaemon]:
    """A daemon with one worker on the CPU, for many tests, each of which leaves it without components."""
    started = start_daemon(1)
    started.wait_ready()
    yield started
    with started.connect() as client:
        until_empty(client)


@pytest.fixture
def open_fds() -> Callable[[], int]:
    """Count this process's open descriptors; what earlier tests left to the garbage collector is closed first."""
    gc.collect()
    return lambda: len(os.listdir("/proc/self/fd")) - 1  # less the listing's own


@pytest.fixture
def no_free_fd() -> Iterator[Callable[[], None]]:
    """Use up every descriptor that this process may open, until the test ends."""
    taken: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def exhaust() -> None:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                return

    yield exhaust
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for fd in taken:
        os.close(fd)
