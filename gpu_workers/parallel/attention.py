"""Choose an attention backend of xDiT, and try it when the group starts.

xfuser registers every backend, installed or not, and a missing one fails at the first step of the first job. So the
chosen one runs once at start, on a few tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from xditd.gpu_workers.kernels import flash3
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xfuser.core.distributed.attention_backend import AttentionBackendType

logger = logging.getLogger(__name__)

AUTO = "auto"
"""xDiT's own choice: the fastest that it finds installed."""

LOSSLESS = ("CUDNN", "FLASH_4", "FLASH_3", "FLASH", "SDPA_FLASH", "SDPA_EFFICIENT", "SDPA", "SDPA_MATH")
TAKES_FLOAT32 = frozenset({"SDPA", "SDPA_MATH", "SDPA_EFFICIENT"})
FLASH_3_FORWARD = "FLASH_3_FORWARD"
"""The backend of :mod:`flash3`; xDiT has no such name."""
HOPPER = 9
HEAD_SIZE = 128
PROBE_TOKENS = 32
# The errors of backends whose package, kernel or GPU generation is missing.
PROBE_FAULTS = (RuntimeError, NameError, ImportError, AttributeError, TypeError, ValueError, AssertionError)


def requested(backend: str, device: torch.device) -> str | None:
    """Return the name to give to xDiT; ``None``: xDiT chooses.

    Raises:
        Unsupported: the named backend is unknown or does not run here.
    """
    if backend.lower() != AUTO:
        return check(backend, device)
    # With a torch built for CUDA, xDiT chooses a GPU kernel on a CPU, too.
    return "SDPA" if device.type == "cpu" else None


def automatic(device: torch.device) -> tuple[str, str | None]:
    """Return what :data:`AUTO` runs on ``device`` without rings: in diffusers' modules, and in fused kernels, if any.

    Raises:
        Unsupported: what xDiT chooses does not run here.
    """
    from xfuser.core.distributed.runtime_state import RuntimeState

    named = requested(AUTO, device) or str(RuntimeState._select_attention_backend(None).name)
    plain = check(named, device)
    return plain, for_fused(AUTO, plain, device) if device.type == "cuda" else None


def check(backend: str, device: torch.device) -> str:
    """Run a backend once on ``device``; return xDiT's spelling of its name.

    Raises:
        Unsupported: unknown, or it does not run here; the message lists the lossless ones that do.
    """
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    found = AttentionBackendType.__members__.get(backend.upper())
    if found is None:
        raise Unsupported(f"attention backend {backend!r} is unknown; those that run here: {_list_working(device)}")
    fault = _probe(found, device)
    if fault is not None:
        raise Unsupported(
            f"attention backend {backend!r} does not run here ({fault}); those that do: {_list_working(device)}"
        )
    return str(found.name)


def for_dtype(backend: str, dtype: torch.dtype, device: torch.device) -> str:
    """Return the backend for weights of ``dtype``: most GPU kernels take half precision only, SDPA takes all."""
    if dtype == torch.float32 and device.type == "cuda" and backend not in TAKES_FLOAT32:
        return "SDPA"
    return backend


def use(backend: str) -> None:
    """Set the backend of xDiT's attention layers in this process."""
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.core.distributed.runtime_state import get_runtime_state

    get_runtime_state().attention_backend = AttentionBackendType[backend]


def for_fused(requested: str, chosen: str, device: torch.device) -> str:
    """Return the backend of fused transformers: FlashAttention 3 if it runs and the setting is ``auto``.

    It is the fastest lossless one on Hopper GPUs: 713 TFLOP/s for 24 heads of 4,608 tokens, cuDNN's 669
    (``benchmarks/run.py step_time --attention``). xDiT supports it by a package without wheels.
    """
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
    if requested.lower() == AUTO and is_hopper and flash3.is_installed():
        tokens = torch.ones(1, 1, PROBE_TOKENS, HEAD_SIZE, dtype=torch.bfloat16, device=device)
        try:
            function(FLASH_3_FORWARD)(tokens, tokens[:, :, 1:], tokens[:, :, 1:])
        except PROBE_FAULTS as error:
            logger.warning("fa3-fwd is installed and does not run: %s; attention=%s", error, chosen)
        else:
            return FLASH_3_FORWARD
    return chosen


def function(backend: str) -> Callable[..., torch.Tensor]:
    """Return the function of a backend: query, key, value and result are (batch, heads, tokens, head size)."""
    if backend == FLASH_3_FORWARD:
        return flash3.forward()
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    attend = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType[backend]]

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, attend(query, key, value, dropout_p=0.0, is_causal=False)[0])

    return run


def _probe(backend: AttentionBackendType, device: torch.device) -> str | None:
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY

    function = ATTENTION_FUNCTION_REGISTRY.get(backend)
    if function is None:
        return "not registered"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = torch.ones(1, 1, PROBE_TOKENS, HEAD_SIZE, dtype=dtype, device=device)
    try:
        # Keys shorter than queries, as when padding is trimmed.
        function(tokens, tokens[:, :, 1:], tokens[:, :, 1:], dropout_p=0.0, is_causal=False)
    except PROBE_FAULTS as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


def working(device: torch.device) -> list[str]:
    """Return the lossless backends that run on ``device``, each tried once, fastest first."""
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    return [name for name in LOSSLESS if _probe(AttentionBackendType[name], device) is None]


def _list_working(device: torch.device) -> str:
    return ", ".join(working(device))
