"""Check this machine and this user without other libraries: folders, limits, shared memory, environment."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from xditd.client.doctor.findings import Finding, fail, ok, warn
from xditd.client.output_files import try_writing
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import BadRequest

SHM: Final = Path("/dev/shm")  # noqa: S108 - not written to
SHM_WARN_BYTES: Final = 2 * 2**30
SHM_FAIL_BYTES: Final = 64 * 2**20
"""The I/O block of one 1024x1024 job with its image takes about 10 MiB."""

FILES_WARN: Final = 4096
FILES_FAIL: Final = 256

_NO_ROOM_REMEDY: Final = "make room there (df, df -i), or choose another (--runtime-dir or XDITD_RUNTIME_DIR)"
_ALLOCATORS: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_GIB: Final = 2**30


def check_runtime_folder(runtime: RuntimeDir) -> Finding:
    """Check that the daemon could use this runtime folder."""
    name, path = "runtime folder", runtime.path
    try:
        runtime.check_socket_paths()
    except BadRequest as error:
        return fail(name, error.detail, "choose a shorter one (--runtime-dir or XDITD_RUNTIME_DIR)")
    try:
        found = path.lstat()
    except FileNotFoundError:
        parent = next((each for each in path.parents if each.exists()), Path("/"))
        why = _why_not_written(parent)
        if not why:
            return ok(name, f"{path}: does not exist yet; the daemon creates it with mode 0700")
        return fail(name, f"{path}: does not exist, and {parent} cannot be written: {why}", _NO_ROOM_REMEDY)
    except OSError as error:
        return fail(name, f"{path}: {error.strerror}", "choose another (--runtime-dir or XDITD_RUNTIME_DIR)")
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        return fail(name, f"{path}: not a folder", "remove it, or choose another (XDITD_RUNTIME_DIR)")
    if found.st_uid != os.getuid():
        return fail(name, f"{path}: owned by uid {found.st_uid}, not by {os.getuid()}", "choose another folder")
    if mode & 0o077:
        return fail(name, f"{path}: mode {mode:04o} gives other users access", f"chmod 700 {path}")
    why = _why_not_written(path)
    if why:
        return fail(name, f"{path}: cannot be written: {why}", _NO_ROOM_REMEDY)
    return ok(name, f"{path}: private, mode {mode:04o}, can be written")


def _why_not_written(folder: Path) -> str:
    try:
        try_writing(folder)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_shared_memory(path: Path = SHM) -> Finding:
    """Check that shared memory has room for job tensors, and for the weights of clients without a GPU."""
    name = "shared memory"
    try:
        found = os.statvfs(path)
    except OSError as error:
        return fail(name, f"{path}: {error.strerror}", f"mount -t tmpfs tmpfs {path}")
    free_bytes, total_bytes = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    detail = f"{path}: {free_bytes / _GIB:.1f} of {total_bytes / _GIB:.1f} GiB free"
    remedy = f"delete unneeded files in {path}, or mount -o remount,size=8G {path} (containers: --shm-size=8g)"
    if free_bytes < SHM_FAIL_BYTES:
        return fail(name, detail, remedy)
    return warn(name, detail, remedy) if free_bytes < SHM_WARN_BYTES else ok(name, detail)


def check_locked_memory(limits: Mapping[str, int], *, has_gpu: bool) -> Finding:
    """Check that CUDA may pin host memory for fast uploads."""
    limit = limits["memlock"]
    text = "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit / 2**20:.0f} MiB"
    if limit == resource.RLIM_INFINITY or not has_gpu:
        return ok("locked memory", text)
    return warn(
        "locked memory",
        f"{text}: large uploads to the GPU may be refused or slow",
        "LimitMEMLOCK=infinity in the unit, or memlock in /etc/security/limits.d",
    )


def check_open_files(limits: Mapping[str, int]) -> Finding:
    """Check the limit of file descriptors: the daemon needs two for each client, and every worker one for each lent
    file or block."""
    limit = limits["files"]
    remedy = "LimitNOFILE=65536 in the unit, or ulimit -n 65536 before xditd serve"
    if limit != resource.RLIM_INFINITY and limit < FILES_FAIL:
        return fail("open files", f"at most {limit}", remedy)
    if limit != resource.RLIM_INFINITY and limit < FILES_WARN:
        return warn("open files", f"at most {limit}", remedy)
    return ok("open files", "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}")


def limits_of(pid: int | None) -> dict[str, int]:
    """Soft limits of another process of this user, or of this process. Source: getrlimit(2); prlimit(2)."""
    wanted = {"memlock": resource.RLIMIT_MEMLOCK, "files": resource.RLIMIT_NOFILE}
    try:
        return {key: resource.prlimit(pid or 0, number)[0] for key, number in wanted.items()}
    except (ProcessLookupError, PermissionError):
        return {key: resource.getrlimit(number)[0] for key, number in wanted.items()}


def check_allocator(environ: Mapping[str, str]) -> Finding:
    """Check that CUDA can export what torch allocates in programs that are started from this environment."""
    name = "allocator"
    text = ", ".join(f"{key}={environ[key]}" for key in _ALLOCATORS if environ.get(key))
    if "cudaMallocAsync" in text or "expandable_segments:True" in text:
        return warn(
            name,
            f"{text}: CUDA exports no memory of this allocator, so lent tensors are copied once on their GPU",
            "allocate weights in a xditd.client.Arena, or unset the variable; workers are not affected",
        )
    return ok(name, text or "torch's default; memory is lent without a copy")


def check_cluster(environ: Mapping[str, str], proc: Path = Path("/proc")) -> Finding | None:
    """Say what a host of a cluster risks; ``None`` where this user has not joined one, and configured nothing of it."""
    where = _joined_cluster(proc)
    if where is None and not any(environ.get(name) for name in ("XDITD_CLUSTER", "RAY_AUTH_MODE", "RAY_ADDRESS")):
        return None
    return warn(
        "cluster",
        f"{where or 'configured'}: "
        "who holds the token of the Ray cluster can run code as this user on every host; Ray listens on the network",
        "leave it (xditd cluster leave) unless you trust every host; use a token and TLS: docs/security.md",
    )


def _joined_cluster(proc: Path) -> str | None:
    """Return which cluster a process of this user has joined, by the arguments of ``client/cluster/member.py``."""
    for folder in proc.glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            is_own = folder.stat().st_uid == os.getuid()
        except OSError:
            continue  # it has ended
        if is_own and "xditd.client.cluster.member" in words[:-2]:
            address, name, *_ = words[words.index("xditd.client.cluster.member") + 1 :]
            return f"this host has joined {address} as {name}"
    return None


def check_devices(dev: Path = Path("/dev")) -> Finding | None:
    """Check that NVIDIA's device files exist and this user may open them; ``None`` without an NVIDIA GPU."""
    name = "device files"
    if not (dev / "nvidiactl").exists():
        return None
    missing = [each for each in ("nvidia-uvm",) if not (dev / each).exists()]
    if missing:
        return fail(name, f"{dev}/{missing[0]} is missing", "sudo nvidia-modprobe -u (or enable nvidia-persistenced)")
    denied = [path for path in sorted(dev.glob("nvidia[0-9]*")) if not os.access(path, os.R_OK | os.W_OK)]
    if denied:
        return fail(name, f"{denied[0]} may not be opened by uid {os.getuid()}", "join the group that owns it (ls -l)")
    return ok(name, f"{len(list(dev.glob('nvidia[0-9]*')))} GPU(s) in {dev}")
