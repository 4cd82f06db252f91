"""What the leader imports for the ranks that it forks, in processes of their own."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from xditd.daemon.groups.worker_environment import worker_environment
from xditd.gpu_workers.process import leader, preload
from xditd.ipc.errors import WorkersLost
from xditd.ipc.worker_messages import UNEXPLAINED

PROGRAM = """
import json, os, sys
import torch
asked = []
names = ("current_device", "get_device_properties", "_lazy_init", "_raw_device_count_nvml", "_raw_device_uuid_nvml")
for name in names:
    def ask(*given, name=name, own=getattr(torch.cuda, name)):
        asked.append(name)
        return own(*given)
    setattr(torch.cuda, name, ask)
from xditd.gpu_workers.process import leader, preload
preload.preload(preload.FOR_RANKS + preload.FOR_STANDBY)
found = {"asked": list(asked), "xfuser": [name for name in sys.modules if name.startswith("xfuser.core")]}
found["counted"] = preload.count_gpus()
found["asked by the leader"] = asked
found["threads"] = preload.find_threads()
links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
found["devices"] = [path for path in map(os.path.realpath, links) if path.startswith("/dev/nvidia")]
print(json.dumps(found))
"""
FORKED = """
import json, os, sys, torch
from xditd.gpu_workers.process import leader, preload
preload.preload(preload.FOR_RANKS + preload.FOR_STANDBY)
found = {"counted": preload.count_gpus(), "opened": preload.has_opened_gpu()}
reader, writer = os.pipe()
if os.fork() == 0:
    torch.cuda.set_device(0)
    answer = float(torch.arange(4, device="cuda:0").sum())
    os.write(writer, str(answer).encode())
    os._exit(0)
os.close(writer)
found["sum in a forked rank"] = os.read(reader, 9).decode()
print(json.dumps(found))
"""


def test_commands_are_analysed_before_ranks_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[bool] = []
    monkeypatch.setattr(preload.command_decoder, "warm_up", lambda: warmed.append(True))
    monkeypatch.setattr(preload, "lean_imports", MagicMock())  # it changes libraries of this process
    monkeypatch.setattr(preload, "quiet_libraries", lambda: None)
    preload.preload(())
    assert warmed == [True]


@pytest.mark.gpu
def test_a_forked_rank_opens_its_gpu() -> None:
    found = run(FORKED)
    assert found == {"counted": torch.cuda.device_count(), "opened": False, "sum in a forked rank": "6.0"}


def test_the_leader_opens_no_cuda_and_forks_with_one_thread() -> None:
    found = run(PROGRAM)
    assert found.pop("counted") == torch.cuda.device_count()
    assert found == {"asked": [], "xfuser": [], "asked by the leader": [], "threads": "", "devices": []}


def test_ranks_find_their_modules_imported_and_the_first_lend_its_own() -> None:
    found = run("""
import json, sys
from xditd.gpu_workers.process import leader, preload, lean_imports, xfuser_cpu
preload.preload(preload.FOR_RANKS + preload.FOR_STANDBY)
before = set(sys.modules)
with xfuser_cpu.importable():
    lean_imports.import_xfuser()
from xditd.gpu_workers.process.torch_executor import TorchExecutor
from xditd.gpu_workers.process import late_imports
found = {"rank": [n for n in sys.modules if n not in before and not n.startswith(("xditd.", "xfuser", "yunchang"))]}
imports = late_imports.LateImports()
while imports.wait_s is not None:
    imports.run_next()
before = set(sys.modules)
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
import xditd.gpu_workers.families.flux1.recipe, xditd.gpu_workers.families.qwen_image.recipe
found["lend"] = [n for n in sys.modules if n not in before]
print(json.dumps(found))
""")
    assert len(found["rank"]) < 25, found["rank"]
    assert found["lend"] == []


def test_libraries_that_ask_for_a_gpu_are_told_what_another_process_has_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """diffusers asks while it is imported, where torch is a build for CUDA. NVML does not survive a fork either."""
    asked: list[int] = []
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: asked.append(os.getpid()) or 3)
    with preload._without_driver():
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 3
        assert asked == []  # by this process
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
    assert torch.cuda.device_count() == 3
    assert asked == [os.getpid()]


def test_ranks_are_spawned_where_an_import_has_opened_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert preload.has_opened_gpu()
    methods: list[str] = []
    monkeypatch.setattr(leader, "_run", lambda options, choice, devices, method, attempts: methods.append(method) or 0)
    leader.lead(SimpleNamespace(device="cpu", workers=2, degrees={}), 0, [])
    assert methods == ["spawn"]


def test_torchs_compiler_starts_no_processes_in_ranks() -> None:
    """The leader imports it, and it reads its settings once, before a rank could make them."""
    found = run(
        """
import json, threading
from xditd.gpu_workers.process import leader, preload
preload.preload(preload.FOR_RANKS)
from torch._inductor.async_compile import get_compile_threads
found = []
thread = threading.Thread(target=lambda: found.append(get_compile_threads()))  # its settings are those of a thread
thread.start()
thread.join()
print(json.dumps(found))
""",
        env=worker_environment(os.environ, None),
    )
    assert found == [1]


@pytest.mark.gpu
def test_cuda_that_another_library_has_opened_is_seen() -> None:
    assert run("""
import ctypes, json, torch
from xditd.gpu_workers.process import preload
before = preload.count_gpus(), preload.has_opened_gpu()
assert ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
print(json.dumps([before[0] > 0, before[1], torch.cuda.is_initialized(), preload.has_opened_gpu()]))
""") == [True, False, False, True]


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch and the driver say that CUDA is not open, as tests before may have opened it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: SimpleNamespace(cuDeviceGetCount=lambda _: 3))


@pytest.mark.usefixtures("closed")
def test_the_device_of_cuda_is_found_among_the_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "nvidia-uvm"
    monkeypatch.setattr(preload, "_CUDA_DEVICE", str(device))
    assert not preload.has_opened_gpu()
    with device.open("w"):
        assert preload.has_opened_gpu()


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize(("status", "is_opened"), [(0, True), (100, True), (3, False), (34, False)])
def test_the_driver_itself_says_whether_it_is_open(
    status: int, is_opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3: it is not, 34: a stub for linking, 100: it is, and finds no GPU."""
    library = SimpleNamespace(cuDeviceGetCount=lambda _: status)
    monkeypatch.setattr(preload, "_CUDA_DEVICE", "/dev/of-no-library")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: library if mode & os.RTLD_NOLOAD else pytest.fail(name))
    assert preload.has_opened_gpu() is is_opened


def test_ranks_are_spawned_where_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a profiler that Python's start loads, which may hold a lock at the fork."""
    found = run("""
import json, threading, time
from types import SimpleNamespace
from xditd.gpu_workers.process import leader, preload
asked = []
leader._run = lambda options, choice, devices, method, attempts: asked.append(method) or 0
options = SimpleNamespace(device="cpu", workers=2, degrees={})
leader.lead(options, 0, [])
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
leader.lead(options, 0, [])
threads = preload.find_threads()
end.set()
thread.join()
leader.lead(options, 0, [])
print(json.dumps({"methods": asked, "threads": threads}))
""")
    assert found["methods"] == ["fork", "spawn", "fork"]
    assert "threads run in the leader (python" in found["threads"]


def test_a_thread_of_jemalloc_is_no_obstacle() -> None:
    """pyarrow starts one at its import; before a fork, jemalloc takes the locks that it may hold."""
    found = run("""
import ctypes, json, threading
from xditd.gpu_workers.process import preload
end, is_named = threading.Event(), threading.Event()
def run():
    ctypes.CDLL(None).prctl(15, b"jemalloc_bg_thd", 0, 0, 0)  # PR_SET_NAME, as jemalloc names its own
    is_named.set()
    end.wait()
thread = threading.Thread(target=run)
thread.start()
is_named.wait()
threads = preload.find_threads()
end.set()
thread.join()
print(json.dumps({"threads": threads}))
""")
    assert found["threads"] == ""


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="needs pyarrow")
def test_a_fork_beside_pyarrows_allocator_allocates() -> None:
    found = run("""
import json, os, pyarrow
from xditd.gpu_workers.process import preload
pool = pyarrow.jemalloc_memory_pool()
kept = [pyarrow.allocate_buffer(1 << 20, memory_pool=pool) for _ in range(64)]
del kept[::2]
found = {"threads": preload.find_threads()}
child = os.fork()
if child == 0:
    kept = [pyarrow.allocate_buffer(1 << 20, memory_pool=pool) for _ in range(256)]
    del kept
    os._exit(0)
found["status"] = os.waitpid(child, 0)[1]
print(json.dumps(found))
""")
    assert found == {"threads": "", "status": 0}


def test_a_driver_that_raises_leaves_the_word_to_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 // 0)
    with pytest.raises(WorkersLost, match=f"exited with status 1 {UNEXPLAINED}$"):  # the daemon adds the last error
        preload.count_gpus()


def test_a_driver_that_crashes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkersLost, match="the process that counts GPUs was killed by SIGKILL"):
        preload.count_gpus()


def run(program: str, env: Mapping[str, str] | None = None) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
