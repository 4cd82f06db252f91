"""``xditd cluster join``: start this host's Ray and its member process, start them again when the cluster was lost."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from xditd.client.cluster import security
from xditd.client.subprograms import end_with_parent, module_command, module_environment
from xditd.ipc.addresses import user_path
from xditd.ipc.errors import BadRequest, PeerError, Unsupported

logger = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER: Final = 36
_libc: Final = ctypes.CDLL(None)
_REFUSED: Final = 2
"""The member's exit status if this host must not join."""

_END_DEADLINE_S: Final = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 15.0
_OBJECT_STORE_BYTES: Final = 512 << 20
"""Conditioning and results on their way."""


@dataclass(frozen=True)
class Membership:
    """How this host joins: ``address`` is the head's, ``node_ip`` this host's own."""

    address: str
    name: str
    node_ip: str
    is_head: bool
    search_path: tuple[Path, ...]
    runtime_dir: Path | None
    temp_dir: Path | None

    def ray_command(self) -> list[str]:
        """Return the command of this host's Ray, which runs until it is ended."""
        resource = json.dumps({f"xditd:{self.name}": 1})
        command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
        command += ["-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={self.node_ip}"]
        if self.is_head:
            command += ["--head", f"--port={security.split_address(self.address)[1]}", "--include-dashboard=false"]
            command += [] if self.temp_dir is None else [f"--temp-dir={self.temp_dir}"]
        else:
            command += [f"--address={self.address}"]
        command += ["--num-cpus=0", "--num-gpus=0", f"--resources={resource}", "--include-log-monitor=false"]
        return [*command, f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]

    def member_command(self) -> list[str]:
        """Return the command of the member process."""
        folder = "" if self.runtime_dir is None else str(self.runtime_dir)
        arguments = [self.address, self.name, folder, *map(str, self.search_path)]
        return module_command("xditd.client.cluster.member", arguments)


def require_ray() -> None:
    """Raise ``Unsupported`` if ray is not installed."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise Unsupported("ray: not installed here; pip install 'xditd[cluster]'") from None


def join(membership: Membership) -> bool:
    """Join, and stay until a signal ends this process or the host leaves; returns whether it has left.

    Raises:
        BadRequest: another join of this user has joined this host by this name.
        PeerError: this host was refused; the member process has logged why.
    """
    with _claim(membership.name):
        return _stay_joined(membership)


def _claim(name: str) -> socket.socket:
    """Claim the name on this host, until the socket is closed or this process ends, however it ends."""
    # An abstract socket belongs to a network namespace, as a host's address does, and leaves no file behind.
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()  # a name may be longer than an address
        claim.bind(f"\0xditd-cluster-{os.getuid()}-{digest}")
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise BadRequest(
            f"name {name!r}: another `xditd cluster join` on this host has it; end it, or choose another by --name"
        ) from None
    return claim


def _stay_joined(membership: Membership) -> bool:
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # What `ray start` started becomes a child of this process if `ray start` is killed, so that it can be ended.
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pause_s = _FIRST_PAUSE_S
    while not stopping.is_set():
        began_s = time.monotonic()
        status = _stay(membership, stopping)
        if status == 0:
            return True
        if status == _REFUSED:
            raise PeerError(
                f"host {membership.name}: refused by the cluster at {membership.address}; see the log above"
            )
        if time.monotonic() - began_s > 60.0:
            pause_s = _FIRST_PAUSE_S
        if not stopping.is_set():
            logger.warning("cluster lost, joining again in %.0f s address=%s", pause_s, membership.address)
            stopping.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return False


def _stay(membership: Membership, stopping: threading.Event) -> int | None:
    """Run Ray and the member until one of them ends; returns the member's status, ``None`` if it had to be ended."""
    environment = security.tuned(module_environment())
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in (membership.ray_command(), membership.member_command()):
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                    start_new_session=True,
                    preexec_fn=end_with_parent,  # `ray start` then ends its Ray
                )
            )
        raylet, member = processes
        while not stopping.wait(0.2) and raylet.poll() is None and member.poll() is None:
            pass
        return member.poll()
    finally:
        _end(processes)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes and all that they started."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    ends_s = time.monotonic() + _END_DEADLINE_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, ends_s - time.monotonic()))
    while time.monotonic() < ends_s + _END_DEADLINE_S and (left := _children()):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.poll()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)  # the kernel hands on the children of those that have just ended


def _children() -> list[int]:
    found: list[int] = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            found += map(int, Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


def folders(search_path: str) -> tuple[Path, ...]:
    """Split a search path at its colons.

    Raises:
        BadRequest: a folder does not exist, or cannot be read.
    """
    found = tuple(user_path(each).absolute() for each in search_path.split(":") if each)
    for each in found:
        try:
            each.stat()
        except FileNotFoundError:
            raise BadRequest(f"search path {each}: does not exist on this host") from None
        except OSError as error:
            raise BadRequest(f"search path {each}: {error.strerror}") from None
        if not os.access(each, os.R_OK | (os.X_OK if each.is_dir() else 0)):
            raise BadRequest(f"search path {each}: this user may not read it")
    return found
