"""What every test shares: no network, and hardware markers that skip where the hardware is not."""

from __future__ import annotations

import os
from functools import cache

import pytest

# Also for a bare `pytest`: a test that would download must fail instead. Child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"


@cache
def gpu_count() -> int:
    """Count NVIDIA GPUs through the driver's management library, without opening a context on any."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for GPUs that this machine does not have; import torch only if there are such tests."""
    for item in items:
        needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
        if needed and gpu_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPU(s), found {gpu_count()}"))
