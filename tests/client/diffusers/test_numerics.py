from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def set_precision(owner: Any) -> Callable[[str], None]:
    return lambda value: setattr(owner, "fp32_precision", value)


@pytest.mark.parametrize(
    ("change", "changed", "default", "text"),
    [
        (torch.set_flush_denormal, True, False, "set_flush_denormal"),
        (torch._C._set_mkldnn_enabled, False, True, "mkldnn.enabled"),
        (torch._C._set_cudnn_enabled, False, True, "cudnn.enabled"),
        (torch.backends.mha.set_fastpath_enabled, False, True, "set_fastpath_enabled"),
        (torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, True, False, "reduction_math_sdp"),
        (torch._C._set_cublas_allow_fp16_accumulation, True, False, "allow_fp16_accumulation"),
        (set_precision(torch.backends), "tf32", "none", "precision of float32"),
        (set_precision(torch.backends.cuda.matmul), "tf32", "none", "precision of float32"),
        (set_precision(torch.backends.mkldnn.matmul), "bf16", "none", "precision of float32"),
        (set_precision(torch.backends.mkldnn.conv), "bf16", "none", "precision of float32"),
    ],
)
def test_settings_that_are_not_sent_are_refused(
    change: Callable[[Any], None], changed: Any, default: Any, text: str
) -> None:
    before = current_numerics(CPU)
    change(changed)
    try:
        with pytest.raises(Unsupported, match=text):
            current_numerics(CPU)
    finally:
        change(default)
    assert current_numerics(CPU) == before
