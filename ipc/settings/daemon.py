"""The daemon's settings, and the options that it passes to the workers."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from xditd.ipc import limits
from xditd.ipc.addresses import default_runtime_dir, parse_metrics_address
from xditd.ipc.degrees import AUTO, parse_layout
from xditd.ipc.settings.setting import about, settings_of
from xditd.ipc.tensors import Acceleration

CONFIG_VARIABLE: Final = "XDITD_CONFIG"
"""The path of the daemon's TOML file."""

Device = Literal["auto", "cuda", "cpu"]
Kernels = Literal["auto", "fused", "plain"]
Precision = Literal["bf16", "fp8"]
NativeProducts = Literal["auto", "always", "never"]
Standby = Literal["auto", "on", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]

_daemon = partial(about, section="daemon")
_workers = partial(about, section="workers")

_Count = Annotated[int, Meta(ge=1, le=100_000)]
_Bytes = Annotated[int, Meta(ge=1, le=limits.MAX_BYTES)]
_Seconds = Annotated[float, Meta(gt=0, le=86_400)]
_Name = Annotated[str, Meta(min_length=1, max_length=limits.MAX_NAME_CHARS, pattern="^[^-]")]
_Word = Annotated[str, Meta(min_length=1)]


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of both daemon and workers. ``layout`` is "auto" or degrees in the format of ``xditd.ipc.degrees``."""

    log_level: Annotated[
        LogLevel, _daemon("lowest level that is logged: debug, info, warning or error", metavar="LEVEL", reload=True)
    ] = "info"
    workers: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=1, le=1024)],
        _workers("worker processes, one for each GPU; auto: all GPUs, or 2 on CPU", key="count"),
    ] = "auto"
    device: Annotated[Device, _workers("auto (GPUs if there are any), cuda or cpu")] = "auto"
    layout: Annotated[
        _Name,
        _workers(
            "parallel degrees ulysses, ring and cfg of a job; auto: the largest possible ulysses, then ring. A model "
            "whose number of attention heads is not a multiple of ulysses gets its own degrees",
            values='"auto", or degrees that multiply to the number of workers, such as "ulysses=2,ring=2,cfg=2"',
            check=parse_layout,
        ),
    ] = AUTO
    attention_backend: Annotated[
        _Name,
        _workers(
            "attention kernel; auto: the best one that is installed",
            values='"auto" or the name of an attention backend',
        ),
    ] = "auto"
    kernels: Annotated[
        Kernels, _workers("fused kernels, or diffusers' modules (plain); auto: fused on GPUs, if they pass their check")
    ] = "auto"
    precision: Annotated[
        Precision,
        _workers(
            "precision of a transformer's matrix products; fp8 is faster, not lossless, and keeps an fp8 copy of the "
            "weights (half their size)"
        ),
    ] = "bf16"
    acceleration: Annotated[
        Acceleration,
        _workers(
            "forwards of modules that run as their class: eager; captured as CUDA graphs, with the same bits; with "
            "compiled blocks, which round otherwise; auto: on GPUs compiled, and captured where the host takes long"
        ),
    ] = "auto"
    native_products: Annotated[
        NativeProducts,
        _workers(
            "products of int8 and float8 weights in eight bits, which also round the input, as ComfyUI does; never: "
            "weights are dequantised first; auto: on GPUs, where they were measured to be faster"
        ),
    ] = "auto"


class DaemonSettings(WorkerOptions, frozen=True, kw_only=True):
    """All settings of the daemon."""

    runtime_dir: Annotated[
        _Name,
        _daemon(
            "private folder of the sockets and the lock; created with mode 0700",
            values="the path of a folder",
            default="$XDG_RUNTIME_DIR/xditd, or /tmp/xditd-<uid>",
        ),
    ] = msgspec.field(default_factory=lambda: str(default_runtime_dir().path))
    queue_limit: Annotated[_Count, _daemon("jobs that may wait; one more is refused as busy", reload=True)] = 512
    client_queue_limit: Annotated[
        _Count, _daemon("jobs of one client that may wait; one more is refused as busy", reload=True)
    ] = 64
    client_loan_limit: Annotated[_Count, _daemon("components that one client may have on loan", reload=True)] = 64
    client_lent_bytes: Annotated[_Bytes, _daemon("bytes that one client may have on loan", reload=True)] = 2**40
    client_io_bytes: Annotated[
        _Bytes, _daemon("bytes of the I/O blocks that the jobs of one client may use at a time", reload=True)
    ] = 16 * 2**30
    message_bytes: Annotated[
        int,
        Meta(ge=4096, le=limits.MAX_MESSAGE_BYTES),
        _daemon("bytes of the longest message that is read; a lend takes about 100 for each tensor", reload=True),
    ] = limits.MAX_MESSAGE_BYTES
    client_deadline_s: Annotated[
        _Seconds,
        _daemon(
            "seconds without a message from a client until its loans end; clients send four heartbeats in that time",
            reload=True,
        ),
    ] = 60.0
    drain_deadline_s: Annotated[
        _Seconds, _daemon("seconds that a running job has to finish when the daemon stops", reload=True)
    ] = 20.0
    metrics: Annotated[
        _Name,
        _daemon(
            "where Prometheus metrics are served: off, unix (metrics.sock in the runtime folder) or a loopback port",
            values='"off", "unix", or a loopback address and port such as "127.0.0.1:9464"',
            check=parse_metrics_address,
        ),
    ] = "off"
    start_deadline_s: Annotated[_Seconds, _workers("seconds from the start of the workers until all are ready")] = 120.0
    hang_deadline_s: Annotated[
        _Seconds,
        _workers("seconds without progress of a job until the workers are restarted, whatever was measured before"),
    ] = 300.0
    step_deadline_s: Annotated[
        _Seconds,
        _workers("the same for steps and jobs that were measured: 20 times the median, but at least so many seconds"),
    ] = 10.0
    lend_deadline_s: Annotated[
        _Seconds,
        _workers("seconds to map, copy or unmap a component, and one more for each 64 MiB of it; also to plug it"),
    ] = 60.0
    max_restarts: Annotated[
        int,
        Meta(ge=0, le=1000),
        _workers("restarts of the workers in a row without a served job, after which the daemon gives up", reload=True),
    ] = 5
    standby: Annotated[
        Standby,
        _workers(
            "a process that has imported the workers' libraries and waits, so that an ended group is rebuilt without "
            "that; it holds about 0.5 GiB of host memory and no GPU; auto: where the workers use GPUs"
        ),
    ] = "auto"
    worker_command: Annotated[
        tuple[_Word, ...],
        Meta(min_length=1),
        _workers(
            "command that starts the leader of the workers, without its flags",
            key="command",
            flag="",
            variable="",
            values='a list of words, such as ["numactl", "-N0", "python", "-m", ...]',
            default="the daemon's own Python",
        ),
    ] = (sys.executable, "-m", "xditd.gpu_workers")


WORKER_DEFAULTS: Final = WorkerOptions()
WORKER_OPTIONS: Final = settings_of(WorkerOptions)
SETTINGS: Final = tuple(sorted(settings_of(DaemonSettings), key=lambda setting: setting.section))
SECTIONS: Final = tuple(dict.fromkeys(setting.section for setting in SETTINGS))
