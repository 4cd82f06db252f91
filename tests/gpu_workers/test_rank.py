"""What a rank makes of errors that are not ours."""

from __future__ import annotations

import pytest
import torch

from xditd.gpu_workers.rank import _is_want_of_host_memory, _out_of_memory


def test_want_of_host_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert _is_want_of_host_memory(caught.value)
    assert "memory" in _out_of_memory(caught.value).detail
    assert _is_want_of_host_memory(MemoryError())
    assert not _is_want_of_host_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
