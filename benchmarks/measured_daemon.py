"""A daemon in a folder of its own, for ``control_plane.py`` to measure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xditd import __version__
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.protocol import PROTOCOL_VERSION, Request
from xditd.ipc.requests import Hello


def hello() -> Request:
    return Hello(
        request_id="1", protocol_version=PROTOCOL_VERSION, package_version=__version__, client_name="benchmark"
    )


@contextmanager
def daemon(worker_command: list[str] | None) -> Iterator[tuple[RuntimeDir, float, int]]:
    """Run a daemon in a folder of its own; yields the folder, the time of its exec, and its pid."""
    folder = Path(tempfile.mkdtemp(prefix="xditd-"))
    config = folder / "xditd.toml"
    config.write_text(f"[workers]\ncommand = {json.dumps(worker_command)}\n" if worker_command else "")
    runtime = RuntimeDir(folder / "run")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("XDITD_")}
    command = [sys.executable, "-m", "xditd.daemon", "--config", str(config), "--runtime-dir", str(runtime.path)]
    began_s = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environ)
    try:
        yield runtime, began_s, process.pid
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder)


def cpu_s(pid: int) -> float:
    """Seconds that a process has computed, all its threads together (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
