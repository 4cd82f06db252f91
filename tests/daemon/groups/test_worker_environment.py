from __future__ import annotations

from pathlib import Path

from xditd.daemon.groups.worker_environment import FIXED, worker_environment


def test_only_what_is_listed_is_inherited() -> None:
    inherited = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "1",
        "NVIDIA_DRIVER_CAPABILITIES": "all",
        "HF_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "LD_PRELOAD": "/tmp/x.so",
        "MASTER_ADDR": "10.0.0.1",
        "PYTHONSTARTUP": "/tmp/x.py",
        "CUDA_LAUNCH_BLOCKING": "1",
    }
    found = worker_environment(inherited, None)
    assert found.keys() - FIXED.keys() == {"PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}


def test_fixed_values_win() -> None:
    found = worker_environment({"HF_HUB_OFFLINE": "0", "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, None)
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"
    assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "lo"


def test_what_a_parent_framework_sets_does_not_reach_the_workers() -> None:
    """torchrun sets these for its own ranks; its single thread for each rank would be wrong here."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    names += ("MASTER_ADDR", "MASTER_PORT", "CUDA_MODULE_LOADING", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT")
    assert not worker_environment(dict.fromkeys(names, "1"), None).keys() & set(names)


def test_nothing_leads_to_the_folder_in_which_the_daemon_was_started() -> None:
    inherited = {
        "PYTHONPATH": ":/opt/lib:.:./",
        "PATH": "tools:/bin",
        "LD_LIBRARY_PATH": ":",
        "TMPDIR": "tmp",
        "HOME": "/home/alice",
    }
    found = worker_environment(inherited, Path("/srv"))
    assert {name: found.get(name) for name in inherited} == {
        "PYTHONPATH": "/opt/lib",
        "PATH": "/srv/tools:/bin",
        "LD_LIBRARY_PATH": None,
        "TMPDIR": "/srv/tmp",
        "HOME": "/home/alice",
    }
    assert worker_environment(inherited, None)["PATH"] == "/bin"  # the folder was removed
    assert found["PYTHONSAFEPATH"] == "1"
