"""What the ranks of a group import, imported once by the leader, which forks them.

A forked rank has these modules at once and shares their memory with the others. CUDA does not survive a fork, so
nothing here may open it: xfuser asks for the GPU while it is imported, and stays with the ranks. Threads do not survive
one either: those of OpenBLAS, which numpy and scipy start, are stopped before a fork and start again (its own
pthread_atfork), jemalloc locks what its own hold; torch starts none until it computes. Figures: docs/starts.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Final

import torch

from xditd.gpu_workers.models import registry
from xditd.gpu_workers.models.family import Family
from xditd.gpu_workers.process import lean_imports
from xditd.gpu_workers.process.die_with_parent import die_with_parent
from xditd.gpu_workers.process.lazy_compiler import COMPILER
from xditd.gpu_workers.process.lazy_meta_kernels import META_KERNELS
from xditd.gpu_workers.process.lazy_transformers import without_transformers
from xditd.ipc.codec import command_decoder
from xditd.ipc.errors import WorkersLost
from xditd.ipc.processes import describe_exit
from xditd.ipc.worker_messages import UNEXPLAINED

logger = logging.getLogger(__name__)

_NVML_CHECK: Final = "PYTORCH_NVML_BASED_CUDA_CHECK"
_NVML_COUNT: Final = "_device_count_nvml"
_CUDA_DEVICE: Final = "/dev/nvidia-uvm"
_NOT_OPENED: Final = (3, 34)
"""CUDA_ERROR_NOT_INITIALIZED, and that of a library which stands for the driver's at link time."""
_THREAD_END_S: Final = 0.2
_SAFE_THREADS: Final = ("jemalloc_bg_thd",)
"""Threads whose library takes their locks before a fork, and gives them back in both processes. pyarrow's allocator
starts one while it is imported, which transformers does where it is installed.

Source: jemalloc, src/background_thread.c, "background_thread_prefork0" to "background_thread_postfork_child"."""

FOR_RANKS: Final = ("diffusers.utils.torch_utils", "einops", "triton")
"""What every rank needs before it is ready."""

FOR_LENDS: Final = (
    META_KERNELS,
    "diffusers.loaders.peft",
    "diffusers.loaders.single_file_model",
    "diffusers.models.attention_processor",
    "diffusers.models.autoencoders.vae",
    "diffusers.models.cache_utils",
    "diffusers.models.modeling_outputs",
    "diffusers.models.modeling_utils",
    "diffusers.pipelines.pipeline_utils",
)
"""What the first lend needs: meta kernels, and the modules that all models and pipelines of diffusers share."""

AFTER_LENDS: Final = (
    "sympy",
    "torch.distributed.tensor",
    "transformers",
    "transformers.models",
    "transformers.loss.loss_utils",
    "transformers.modeling_utils",
    COMPILER,
    lean_imports.RING_ATTENTION,
)
"""What no lend needs: what text encoders need, what loads compiled blocks, and what ring attention calls. Before each
come parts of it, so that no single import takes long: a command may wait for one."""

FOR_STANDBY: Final = FOR_LENDS + AFTER_LENDS
"""What the leader of the next group imports beside :data:`FOR_RANKS`: it has the time."""


def quiet_libraries() -> None:
    """Hide warnings of libraries about features that are not used here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # image processors without torchvision
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that xfuser calls


def preload(names: tuple[str, ...]) -> int:
    """Import modules in the leader, before it forks the ranks, which share their pages.

    Nothing of ours opens CUDA here; whether a library has is known from :func:`has_opened_gpu`. Returns the number of
    GPUs that torch sees, which another process counts meanwhile.

    Raises:
        WorkersLost: the GPUs cannot be counted.
    """
    began_s = time.perf_counter()
    quiet_libraries()
    with _without_driver() as count:
        lean_imports.leave_out_peft()
        import_all(names)
        command_decoder.warm_up()
        gpus = count.result()
    logger.info("leader has imported what ranks share imports_s=%.2f", time.perf_counter() - began_s)
    return gpus


def has_opened_gpu() -> bool:
    """Return whether an import has opened CUDA in this process: by torch, or by a library of its own.

    The driver opens one device in every process that has called ``cuInit``; NVML does not. (``nvidia-smi`` runs where
    that device does not exist.) CUDA does not survive a fork, and a context holds memory of a GPU.

    Source: CUDA Driver API, "cuDeviceGetCount": an error before ``cuInit``.
    """
    if torch.cuda.is_initialized():
        return True
    with contextlib.suppress(OSError):  # the driver's library is not loaded
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        if driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) not in _NOT_OPENED:
            return True
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return _CUDA_DEVICE in links


def import_family(family: Family[Any]) -> None:
    """Import a family's operations, with those of diffusers' classes and pipelines that they use."""
    try:
        with without_transformers():
            registry.operations_of(family)
    except Exception as error:  # noqa: BLE001 - only the lend of such a model fails, and says why
        logger.warning("not imported ahead of a lend: family=%s error=%s", family.name, _in_one_line(error))


def import_all(names: tuple[str, ...]) -> None:
    """Import modules ahead of their use, those of :data:`FOR_LENDS` without transformers.

    What is missing here is reported where it is needed.
    """
    for name in names:
        try:
            with without_transformers() if name in FOR_LENDS else contextlib.nullcontext():
                lean_imports.run_deferred(importlib.import_module(name))
        except Exception as error:  # noqa: BLE001 - versions that do not fit each other fail in any way
            logger.warning("not imported ahead of its use: module=%s error=%s", name, _in_one_line(error))


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def _without_driver() -> Iterator[_Count]:
    """Tell libraries that ask for GPUs while they are imported what another process has counted.

    diffusers asks, through ``torch.accelerator``. CUDA would not survive a fork, and what a process has of NVML is not
    that of its forks either. So torch takes NVML's way, which does not open CUDA, and gets its count from here.

    Source: PyTorch documentation, "CUDA semantics", PYTORCH_NVML_BASED_CUDA_CHECK; torch/cuda/__init__.py,
    "device_count".

    Raises:
        WorkersLost: the other process did not answer.
    """
    count = _Count()
    before, own = os.environ.get(_NVML_CHECK), getattr(torch.cuda, _NVML_COUNT, None)
    os.environ[_NVML_CHECK] = "1"
    setattr(torch.cuda, _NVML_COUNT, count.result)
    try:
        yield count
    finally:
        if own is None:
            delattr(torch.cuda, _NVML_COUNT)
        else:
            setattr(torch.cuda, _NVML_COUNT, own)
        if before is None:
            del os.environ[_NVML_CHECK]
        else:
            os.environ[_NVML_CHECK] = before


def count_gpus() -> int:
    """Return the number of GPUs that torch sees.

    Raises:
        WorkersLost: the process that counts them did not answer.
    """
    return _Count().result()


class _Count:
    """The number of GPUs, which a forked process counts: the driver's library stays in the process that opened it."""

    def __init__(self) -> None:
        fork = multiprocessing.get_context("fork")
        self._reader, writer = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_count_gpus, args=(writer, os.getpid()), daemon=True)
        self._process.start()
        writer.close()
        self._answer: str | None = None

    def result(self) -> int:
        """Wait for the number.

        Raises:
            WorkersLost: the process did not answer.
        """
        if self._answer is None:
            try:
                self._answer = self._reader.recv_bytes(maxlength=64).decode()
            except EOFError:
                self._answer = ""
            self._process.join()
            self._reader.close()
        if self._process.exitcode or not self._answer:
            status = self._process.exitcode or 0
            unexplained = f" {UNEXPLAINED}" if status >= 0 else ""
            raise WorkersLost(f"the process that counts GPUs {describe_exit(status)}{unexplained}")
        return int(self._answer)


def find_threads() -> str:
    """Say which other threads run in this process after a fork, which stops those of OpenBLAS; else ``""``.

    A forked rank would have none of them, but the locks that they hold, which nobody would release. Those of libraries
    that see to that are not counted.
    """
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    end_s = time.monotonic() + _THREAD_END_S
    while others := [name for thread, name in _threads() if thread != os.getpid() and name not in _SAFE_THREADS]:
        if time.monotonic() > end_s:
            return (
                f"threads run in the leader ({', '.join(sorted(set(others)))}), which an import or Python's start began"
            )
        time.sleep(0.005)  # one that was joined may be listed for a moment
    return ""


def _threads() -> Iterator[tuple[int, str]]:
    """Return the threads of this process with their names. Source: proc(5), /proc/pid/task/tid/comm."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/comm", encoding="utf-8") as name:
            yield int(thread), name.read().strip()


def _count_gpus(writer: Connection, leader_pid: int) -> None:
    die_with_parent(leader_pid)
    writer.send_bytes(str(torch.cuda.device_count()).encode())
