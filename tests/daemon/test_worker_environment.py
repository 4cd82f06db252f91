from __future__ import annotations

from xditd.daemon.worker_environment import FIXED, worker_environment


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
    found = worker_environment(inherited)
    assert found.keys() - FIXED.keys() == {"PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}


def test_fixed_values_win() -> None:
    found = worker_environment({"HF_HUB_OFFLINE": "0", "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"})
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"
    assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "lo"
