"""The settings of torch and diffusers in this process that change the bits of a forward."""

from __future__ import annotations

import sys
from typing import Any, Final, Literal

import torch
from diffusers.models import attention_dispatch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from xditd.ipc.errors import Unsupported
from xditd.ipc.job_parts import Numerics

_PRECISION_TEXT: Final = (
    "the precision of float32 is set by fp32_precision of torch.backends, which workers cannot follow: set these back "
    "to 'none', and use torch.set_float32_matmul_precision() and torch.backends.cudnn.allow_tf32"
)

_Kernel = Literal["flash", "memory_efficient", "math", "cudnn"]


def current_numerics(device: torch.device) -> Numerics:
    """Return the settings for forwards on a device.

    Raises:
        Unsupported: a setting that the workers cannot follow; the error names it.
    """
    products = torch.backends.cuda.matmul
    if products.allow_bf16_reduced_precision_reduction != products.allow_fp16_reduced_precision_reduction:
        raise Unsupported(
            "torch.backends.cuda.matmul: reduced precision reduction is allowed for one of bfloat16 and float16 alone; "
            "allow it for both or for neither"
        )
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        raise Unsupported("torch has global forward hooks, which workers cannot run: remove them")
    # The mode of torch.set_default_device() counts: it moves the tensors that forwards make.
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]
    if modes:
        raise Unsupported(
            f"{type(modes[0]).__module__}.{type(modes[0]).__qualname__} is active in this process, and changes the "
            "operations of forwards: leave its block, or reset torch.set_default_device(None), for this call"
        )
    enabled: dict[_Kernel, bool] = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        "math": torch.backends.cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    }
    _check_others()
    precision, convolutions_in_tf32 = _float32_settings()
    backend, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    return Numerics(
        autocast=_autocast(device.type),
        default_dtype=_name(torch.get_default_dtype()),
        matmul_precision=precision,
        convolutions_in_tf32=convolutions_in_tf32,
        reductions_in_half=products.allow_bf16_reduced_precision_reduction,
        attention_kernels=tuple(name for name, is_enabled in enabled.items() if is_enabled),
        is_deterministic=torch.are_deterministic_algorithms_enabled(),
        attention_backend=backend.value,
    )


def _float32_settings() -> tuple[Any, bool]:
    """Return the precision of products, a name that :class:`Numerics` has, and whether convolutions use TF32."""
    try:
        precision = torch.get_float32_matmul_precision()
        convolutions_in_tf32 = torch.backends.cudnn.allow_tf32
        onednn: Any = torch.backends.mkldnn
        others = (onednn.conv.fp32_precision, onednn.rnn.fp32_precision)
    except RuntimeError as error:  # what torch says when both of its interfaces were used
        raise Unsupported(_PRECISION_TEXT) from error
    if any(each not in ("none", "ieee") for each in others):
        raise Unsupported(_PRECISION_TEXT)
    return precision, convolutions_in_tf32


def _check_others() -> None:
    """Check the settings that are not sent; workers have torch's defaults.

    Raises:
        Unsupported: one was changed; names it.
    """
    changed = {
        "torch.set_flush_denormal(True)": sys.float_info.min / 2.0 == 0.0,
        "torch.backends.mkldnn.enabled = False": not torch._C._get_mkldnn_enabled(),
        "torch.backends.cudnn.enabled = False": not torch._C._get_cudnn_enabled(),
        "torch.backends.mha.set_fastpath_enabled(False)": not torch.backends.mha.get_fastpath_enabled(),
        "torch.backends.cuda.matmul.allow_fp16_accumulation = True": torch.backends.cuda.matmul.allow_fp16_accumulation,
        "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)": (
            torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
        ),
    }
    if found := [name for name, is_changed in changed.items() if is_changed]:
        raise Unsupported(
            f"{', '.join(found)} changes results, and workers have torch's default: undo it for this call"
        )


def _autocast(device_type: str) -> Any:
    return _name(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else None


def _name(dtype: torch.dtype) -> Any:
    """Return the name of a dtype, one of those that :class:`Numerics` has."""
    return str(dtype).removeprefix("torch.")
