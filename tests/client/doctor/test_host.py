"""Host checks, with the real state of the machine where a test can make it."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from xditd.client.doctor import host
from xditd.client.doctor.findings import Verdict
from xditd.ipc.addresses import RuntimeDir


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="xd") as path:
        yield Path(path)


def test_runtime_folder_that_the_daemon_can_use(folder):
    assert host.check_runtime_folder(RuntimeDir(folder)).verdict is Verdict.OK
    assert host.check_runtime_folder(RuntimeDir(folder / "new")).verdict is Verdict.OK


def test_runtime_folder_with_access_for_others(folder):
    folder.chmod(0o750)
    found = host.check_runtime_folder(RuntimeDir(folder))
    assert found.verdict is Verdict.FAIL
    assert found.remedy == f"chmod 700 {folder}"


CHECK = (
    "import sys; from pathlib import Path; from xditd.client.doctor.host import check_runtime_folder; "
    "from xditd.ipc.addresses import RuntimeDir; found = check_runtime_folder(RuntimeDir(Path(sys.argv[1]))); "
    "print(found.verdict.value, found.detail, found.remedy, sep='|')"
)
SPOIL = 'mount -t tmpfs -o mode=700,$2 tmpfs "$1" && { head -c 64k /dev/zero > "$1/full"; "$3" -c "$4" "$1$5"; }'


@pytest.mark.parametrize("name", ["", "/new"])
@pytest.mark.parametrize(
    ("options", "why"), [("ro", "Read-only file system"), ("size=4k,nr_inodes=5", "No space left on device")]
)
def test_runtime_folder_that_cannot_be_written(folder, options, why, name):
    """Root may write in spite of the mode, so only a real write shows it."""
    word = ["unshare", "-rm", "sh", "-c", SPOIL, "sh", str(folder), options, sys.executable, CHECK, name]
    done = subprocess.run(word, capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("needs a mount namespace of its own")
    verdict, detail, remedy = done.stdout.strip().split("|")
    assert verdict == "fail"
    assert detail.endswith(f"cannot be written: {why}")
    assert "XDITD_RUNTIME_DIR" in remedy


def test_nothing_is_left_in_the_runtime_folder(folder):
    host.check_runtime_folder(RuntimeDir(folder))
    host.check_runtime_folder(RuntimeDir(folder / "new"))
    assert not list(folder.iterdir())


def test_runtime_folder_that_is_a_file_or_too_long(folder):
    (folder / "file").touch()
    assert "not a folder" in host.check_runtime_folder(RuntimeDir(folder / "file")).detail
    assert "at most 107" in host.check_runtime_folder(RuntimeDir(folder / ("x" * 120))).detail


def test_runtime_folder_of_another_user():
    owner = next(
        path for path in (Path("/proc/1"), Path("/etc")) if path.stat().st_uid != os.getuid() or not os.getuid()
    )
    if owner.stat().st_uid == os.getuid():
        pytest.skip("root owns what there is")
    assert "owned by uid" in host.check_runtime_folder(RuntimeDir(owner)).detail


def test_shared_memory(folder, monkeypatch):
    assert host.check_shared_memory(folder / "missing").verdict is Verdict.FAIL
    free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    monkeypatch.setattr(host, "SHM_WARN_BYTES", 1)
    monkeypatch.setattr(host, "SHM_FAIL_BYTES", 0)
    assert host.check_shared_memory(folder).verdict is Verdict.OK
    monkeypatch.setattr(host, "SHM_WARN_BYTES", 2 * free_bytes + 1)
    assert host.check_shared_memory(folder).verdict is Verdict.WARN
    monkeypatch.setattr(host, "SHM_FAIL_BYTES", 2 * free_bytes + 1)
    assert "--shm-size" in host.check_shared_memory(folder).remedy


@pytest.mark.parametrize(
    ("limit", "verdict"),
    [(100, Verdict.FAIL), (1024, Verdict.WARN), (65536, Verdict.OK), (resource.RLIM_INFINITY, Verdict.OK)],
)
def test_open_files(limit, verdict):
    assert host.check_open_files({"files": limit}).verdict is verdict


def test_locked_memory_matters_with_a_gpu():
    assert host.check_locked_memory({"memlock": 2**23}, has_gpu=True).verdict is Verdict.WARN
    assert host.check_locked_memory({"memlock": 2**23}, has_gpu=False).verdict is Verdict.OK
    assert host.check_locked_memory({"memlock": resource.RLIM_INFINITY}, has_gpu=True).verdict is Verdict.OK


def test_limits_of_another_process():
    assert host.limits_of(None) == host.limits_of(os.getpid())
    assert host.limits_of(None)["files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize(
    ("environ", "verdict"),
    [
        ({}, Verdict.OK),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, Verdict.OK),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, Verdict.WARN),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, Verdict.WARN),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, Verdict.OK),
    ],
)
def test_allocator(environ, verdict):
    assert host.check_allocator(environ).verdict is verdict


def test_device_files(folder):
    assert host.check_devices(folder) is None
    (folder / "nvidiactl").touch()
    (folder / "nvidia0").touch()
    assert "nvidia-modprobe" in host.check_devices(folder).remedy
    (folder / "nvidia-uvm").touch()
    assert host.check_devices(folder).verdict is Verdict.OK
