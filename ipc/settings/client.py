"""Flags of every verb of ``xditd`` but ``serve``, whose flags are in ``daemon``: one struct for each verb.

Those that make pictures are in ``generation``, and what several have is in ``flags``.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from xditd.ipc.settings.daemon import Device, LogLevel
from xditd.ipc.settings.flags import RUNTIME_DIR, VERBOSE, DaemonFlags, JsonFlags, Steps
from xditd.ipc.settings.generation import ClusterFlags, GenerateFlags
from xditd.ipc.settings.setting import about, settings_of

DEMO_SIDE_MULTIPLE: Final = 16
"""Height and width in pixels of the demo's images are multiples of it."""

_Interval = Annotated[float, Meta(ge=0.1, le=3600)]
_Seconds = Annotated[int, Meta(ge=1, le=86_400)]

_LOG_LEVEL: Final = about("lowest level that is logged on stderr: debug, info, warning or error", metavar="LEVEL")


class DemoFlags(JsonFlags, frozen=True, kw_only=True):
    """Flags of ``demo``."""

    log_level: Annotated[LogLevel, _LOG_LEVEL] = "warning"
    verbose: Annotated[bool, VERBOSE] = False
    out: Annotated[
        str, about("folder for the demo's output files", kind="path", metavar="DIR", variable="XDITD_DEMO_OUT")
    ] = "out"
    workers: Annotated[
        Annotated[int, Meta(ge=1, le=2)] | None,
        about("worker processes (default: 2, or 1 with one GPU)", metavar="COUNT", variable="XDITD_DEMO_WORKERS"),
    ] = None
    device: Annotated[Device, about("auto (GPUs if there are any), cuda or cpu", metavar="KIND")] = "auto"
    size: Annotated[
        str,
        about(
            f"image size in pixels, multiples of {DEMO_SIDE_MULTIPLE}",
            kind="size",
            multiple=DEMO_SIDE_MULTIPLE,
            variable="XDITD_DEMO_SIZE",
        ),
    ] = "256x256"
    steps: Annotated[Steps, about("denoising steps", metavar="COUNT", variable="XDITD_DEMO_STEPS")] = 8
    keep: Annotated[bool, about("leave the daemon running", variable="XDITD_DEMO_KEEP")] = False


class WaitFlags(DaemonFlags, frozen=True, kw_only=True):
    """Flags of ``wait``."""

    target: Annotated[
        Literal["workers", "daemon"],
        about(
            "what to wait for: workers, or only the daemon, which answers while the workers start",
            flag="--for",
            variable="XDITD_WAIT_FOR",
            metavar="WHAT",
        ),
    ] = "workers"
    wait_s: Annotated[int, Meta(ge=0, le=86_400), about("longest wait", metavar="SECONDS")] = 150


class StopFlags(DaemonFlags, frozen=True, kw_only=True):
    """Flags of ``stop``."""

    deadline_s: Annotated[
        _Seconds, about("longest wait until the daemon has ended", metavar="SECONDS", variable="XDITD_STOP_DEADLINE_S")
    ] = 30


class AdoptFlags(DaemonFlags, frozen=True, kw_only=True):
    """Flags of ``adopt``."""

    deadline_s: Annotated[
        _Seconds, about("longest wait until the copy is made", metavar="SECONDS", variable="XDITD_ADOPT_DEADLINE_S")
    ] = 300


class RevokeFlags(DaemonFlags, frozen=True, kw_only=True):
    """Flags of ``revoke``."""

    deadline_s: Annotated[
        _Seconds, about("longest wait until it is unmapped", metavar="SECONDS", variable="XDITD_REVOKE_DEADLINE_S")
    ] = 300


class StatusFlags(DaemonFlags, frozen=True, kw_only=True):
    """Flags of ``status``."""

    check: Annotated[
        bool, about("exit with 1, with the reason on stderr, if no workers are ready: starting, lost or given up")
    ] = False
    watch: Annotated[
        _Interval | None, about("show it again every so many seconds, until Ctrl-C", metavar="SECONDS")
    ] = None


class TopFlags(msgspec.Struct, frozen=True, kw_only=True):
    """Flags of ``top``."""

    runtime_dir: Annotated[str | None, RUNTIME_DIR] = None
    every: Annotated[_Interval, about("seconds from one look to the next", variable="XDITD_TOP_EVERY")] = 1.0


class LogsFlags(DaemonFlags, frozen=True, kw_only=True):
    """Flags of ``logs``."""

    follow: Annotated[bool, about("keep printing new lines", short="-f")] = False
    lines: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)] | None,
        about("show only the last lines (default: all that the daemon keeps)", short="-n", metavar="COUNT"),
    ] = None


class DoctorFlags(DaemonFlags, frozen=True, kw_only=True):
    """Flags of ``doctor``."""

    quick: Annotated[bool, about("skip the checks that import torch: GPUs, libraries and attention")] = False


class InstallFlags(JsonFlags, frozen=True, kw_only=True):
    """Flags of ``install-service``."""

    user: Annotated[bool, about("install a user service (default)", variable="XDITD_INSTALL_USER")] = False
    system: Annotated[bool, about("install a system service; needs --for", variable="XDITD_INSTALL_SYSTEM")] = False
    check: Annotated[
        bool, about("write nothing; exit 1 if a file is missing or differs", variable="XDITD_INSTALL_CHECK")
    ] = False
    uninstall: Annotated[bool, about("remove the files", variable="XDITD_INSTALL_UNINSTALL")] = False
    dry_run: Annotated[bool, about("write nothing; print the files", variable="XDITD_INSTALL_DRY_RUN")] = False
    owner: Annotated[
        str | None, about("user of the system service", flag="--for", variable="XDITD_INSTALL_FOR", metavar="USER")
    ] = None


VERB_FLAGS: Final[dict[str, type[msgspec.Struct]]] = {
    "wait": WaitFlags,
    "status": StatusFlags,
    "top": TopFlags,
    "generate": GenerateFlags,
    "models": JsonFlags,
    "demo": DemoFlags,
    "comfyui": JsonFlags,
    "cluster": ClusterFlags,
    "logs": LogsFlags,
    "adopt": AdoptFlags,
    "revoke": RevokeFlags,
    "stop": StopFlags,
    "install-service": InstallFlags,
    "doctor": DoctorFlags,
}


CONTROLS_VARIABLE: Final = "XDITD_CONTROLS"
"""Of ``xditd generate --control``, which no struct of flags has."""


def variables() -> frozenset[str]:
    """List the environment variables of all verbs."""
    own = (each.variable for struct in VERB_FLAGS.values() for each in settings_of(struct))
    return frozenset({CONTROLS_VARIABLE, *own})
