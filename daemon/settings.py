"""Every setting once: its flag, its environment variable, its place in the file, and the values that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from xditd.daemon.operations.metrics_server import parse_address
from xditd.ipc import limits
from xditd.ipc.degrees import parse_layout
from xditd.ipc.errors import BadRequest


@dataclass(frozen=True)
class Setting:
    """One setting. ``convert`` takes text or a TOML value; ``ValueError`` or ``TypeError`` mean: beyond ``range``."""

    name: str
    section: str
    key: str
    range: str
    default: str
    help: str
    convert: Callable[[Any], Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "XDITD_" + self.name.upper()

    def read_text(self, text: str, source: str) -> Any:
        """Convert what a flag or a variable says."""
        return self._checked(text, source)

    def read_toml(self, value: object, source: str) -> Any:
        """Convert what the file says; a boolean is not a number."""
        if isinstance(value, bool):
            raise BadRequest(f"{source} = {value!r}: use {self.range}")
        return self._checked(value, source)

    def _checked(self, value: object, source: str) -> Any:
        try:
            return self.convert(value)
        except (ValueError, TypeError):
            raise BadRequest(f"{source} = {value!r}: use {self.range}") from None


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, float):
            raise TypeError
        number = int(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return convert


def _seconds(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or not 0 < number <= 86_400:
        raise ValueError
    return number


def _one_of(*names: str) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return convert


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value or value.startswith("-") or len(value) > limits.MAX_NAME_CHARS:
        raise ValueError
    return value


def _metrics(value: Any) -> str:
    parse_address(_name(value))
    return str(value)


def _layout(value: Any) -> str:
    parse_layout(_name(value))
    return str(value)


def _workers(value: Any) -> str | int:
    return "auto" if value == "auto" else _whole(1, 1024)(value)


SETTINGS: Final = (
    Setting(
        "runtime_dir",
        "daemon",
        "runtime_dir",
        "the path of a folder",
        "$XDG_RUNTIME_DIR/xditd, or /tmp/xditd-<uid>",
        "private folder of the sockets and the lock; made with mode 0700",
        _name,
    ),
    Setting(
        "queue_limit",
        "daemon",
        "queue_limit",
        "a whole number from 1 to 100000",
        "512",
        "requests that may wait; one more is refused as busy",
        _whole(1, 100_000),
    ),
    Setting(
        "client_queue_limit",
        "daemon",
        "client_queue_limit",
        "a whole number from 1 to 100000",
        "64",
        "requests of one client that may wait; one more is refused as busy",
        _whole(1, 100_000),
    ),
    Setting(
        "client_loan_limit",
        "daemon",
        "client_loan_limit",
        "a whole number from 1 to 100000",
        "64",
        "components that one client may have on loan",
        _whole(1, 100_000),
    ),
    Setting(
        "client_lent_bytes",
        "daemon",
        "client_lent_bytes",
        f"a whole number from 1 to {limits.MAX_BYTES}",
        str(2**40),
        "bytes that one client may have on loan",
        _whole(1, limits.MAX_BYTES),
    ),
    Setting(
        "client_io_bytes",
        "daemon",
        "client_io_bytes",
        f"a whole number from 1 to {limits.MAX_BYTES}",
        str(16 * 2**30),
        "bytes of the I/O blocks that the requests of one client may use at a time",
        _whole(1, limits.MAX_BYTES),
    ),
    Setting(
        "message_bytes",
        "daemon",
        "message_bytes",
        f"a whole number from 4096 to {limits.MAX_MESSAGE_BYTES}",
        str(limits.MAX_MESSAGE_BYTES),
        "bytes of the longest message that is read; a manifest takes about 100 for each tensor",
        _whole(4096, limits.MAX_MESSAGE_BYTES),
    ),
    Setting(
        "client_deadline_s",
        "daemon",
        "client_deadline_s",
        "seconds above 0, at most 86400",
        "60",
        "seconds without a sign of life from a client until its loans end; it sends one four times as often",
        _seconds,
    ),
    Setting(
        "drain_deadline_s",
        "daemon",
        "drain_deadline_s",
        "seconds above 0, at most 86400",
        "20",
        "seconds that a running job may go on when the daemon is told to stop",
        _seconds,
    ),
    Setting(
        "log_level",
        "daemon",
        "log_level",
        'one of "debug", "info", "warning", "error"',
        "info",
        "debug, info, warning or error",
        _one_of("debug", "info", "warning", "error"),
    ),
    Setting(
        "metrics",
        "daemon",
        "metrics",
        '"off", "unix", or a loopback address and port such as "127.0.0.1:9464"',
        "off",
        "where Prometheus metrics are served: off, unix (metrics.sock in the runtime folder) or a loopback port",
        _metrics,
    ),
    Setting(
        "workers",
        "workers",
        "count",
        '"auto" or a whole number from 1 to 1024',
        "auto",
        "worker processes, one for each GPU; auto: all GPUs, or 2 on CPU",
        _workers,
    ),
    Setting(
        "device",
        "workers",
        "device",
        'one of "auto", "cuda", "cpu"',
        "auto",
        "auto (GPUs if there are any), cuda or cpu",
        _one_of("auto", "cuda", "cpu"),
    ),
    Setting(
        "layout",
        "workers",
        "layout",
        '"auto", or degrees that multiply to the number of workers, such as "ulysses=2,ring=2,cfg=2"',
        "auto",
        "how workers share a job: degrees of ulysses, ring and cfg; auto: as much ulysses as 24 attention heads allow",
        _layout,
    ),
    Setting(
        "attention_backend",
        "workers",
        "attention_backend",
        '"auto" or the name of an attention backend',
        "auto",
        "attention kernel; auto: the best one that is installed",
        _name,
    ),
    Setting(
        "kernels",
        "workers",
        "kernels",
        'one of "auto", "fused", "plain"',
        "auto",
        "how transformers run; auto: fused kernels on GPUs, checked against plain modules",
        _one_of("auto", "fused", "plain"),
    ),
    Setting(
        "precision",
        "workers",
        "precision",
        'one of "bf16", "fp8"',
        "bf16",
        "of a transformer's matrix products; fp8 is faster, not lossless, and keeps a copy of half the weights",
        _one_of("bf16", "fp8"),
    ),
    Setting(
        "start_deadline_s",
        "workers",
        "start_deadline_s",
        "seconds above 0, at most 86400",
        "120",
        "seconds from starting the group until every worker answers",
        _seconds,
    ),
    Setting(
        "hang_deadline_s",
        "workers",
        "hang_deadline_s",
        "seconds above 0, at most 86400",
        "300",
        "seconds without progress of a job until its workers are ended and rebuilt, whatever was measured before",
        _seconds,
    ),
    Setting(
        "step_deadline_s",
        "workers",
        "step_deadline_s",
        "seconds above 0, at most 86400",
        "10",
        "the same once steps were measured: 20 times the median one, and at least so many seconds",
        _seconds,
    ),
    Setting(
        "lend_deadline_s",
        "workers",
        "lend_deadline_s",
        "seconds above 0, at most 86400",
        "60",
        "seconds to map, plug or unmap a component, and one more for each 64 MiB of it",
        _seconds,
    ),
    Setting(
        "max_restarts",
        "workers",
        "max_restarts",
        "a whole number from 0 to 1000",
        "5",
        "rebuilds in a row without a served job before the daemon gives up",
        _whole(0, 1000),
    ),
)
