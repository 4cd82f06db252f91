from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.utils._python_dispatch import TorchDispatchMode

from xditd.client import Unsupported
from xditd.client.diffusers.numerics import current_numerics

CPU = torch.device("cpu")


def test_settings_of_this_process_are_read() -> None:
    plain = current_numerics(CPU)
    assert plain.autocast is None
    with torch.autocast("cpu", torch.bfloat16), attention_backend("_native_math"):
        changed = current_numerics(CPU)
    assert (changed.autocast, changed.attention_backend) == ("bfloat16", "_native_math")
    assert current_numerics(CPU) == plain


def test_hooks_of_all_modules_are_refused() -> None:
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        with pytest.raises(Unsupported, match="global forward hooks"):
            current_numerics(CPU)
    finally:
        handle.remove()


class OwnMode(TorchDispatchMode):
    """As those that count or change operations."""


def test_modes_of_torch_are_refused() -> None:
    with torch.device("meta"), pytest.raises(Unsupported, match="DeviceContext is active"):
        current_numerics(CPU)
    with OwnMode(), pytest.raises(Unsupported, match="active in this process"):
        current_numerics(CPU)
