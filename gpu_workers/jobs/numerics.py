"""Set the caller's numerics for one call: the global settings of torch and diffusers that change bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from xditd.ipc.errors import Unsupported
from xditd.ipc.job_parts import Numerics
from xditd.ipc.transports.tensor_views import torch_dtype

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@contextmanager
def use_numerics(numerics: Numerics, device: torch.device) -> Iterator[None]:
    """Set the numerics, and restore those of the process at the end.

    Raises:
        Unsupported: an attention backend of diffusers that does not work here.
    """
    products = torch.backends.cuda.matmul
    before = (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        products.allow_bf16_reduced_precision_reduction,
        products.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
    with ExitStack() as stack:
        stack.callback(_set, *before)
        _set(
            torch_dtype(numerics.default_dtype),
            numerics.matmul_precision,
            numerics.convolutions_in_tf32,
            numerics.reductions_in_half,
            numerics.reductions_in_half,
            numerics.is_deterministic,
        )
        stack.enter_context(sdpa_kernel([_KERNELS[name] for name in numerics.attention_kernels]))
        _use_attention_backend(stack, numerics.attention_backend)
        if numerics.autocast is not None:
            stack.enter_context(torch.autocast(device.type, torch_dtype(numerics.autocast)))
        yield


def _set(
    default_dtype: torch.dtype, precision: str, tf32: bool, bf16_reduction: bool, fp16_reduction: bool, exact: bool
) -> None:
    torch.set_default_dtype(default_dtype)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = bf16_reduction
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = fp16_reduction
    if (
        exact != torch.are_deterministic_algorithms_enabled()
    ):  # it imports torch's compiler, for which a call would wait
        torch.use_deterministic_algorithms(exact)


def _use_attention_backend(stack: ExitStack, name: str) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    try:
        stack.enter_context(attention_backend(AttentionBackendName(name)))
    except (ValueError, RuntimeError, ImportError) as error:
        raise Unsupported(f"attention backend {name!r}, as the caller has set it: {error}") from error
