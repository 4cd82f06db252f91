"""Ring attention: ranks send keys and values around, and each merges the partial attention of its own queries.

Exact for every number of tokens: partial results are weighted by their log-sum-exp in float32, and the padding, at the
end of the last rank's keys, is cut off. xfuser's own ring (torch's ``_templated_ring_attention``) takes only parts of
equal length, and only GPU kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist

from xditd.gpu_workers.parallel import attention
from xditd.ipc.errors import Unsupported

logger = logging.getLogger(__name__)

Attended = tuple[torch.Tensor, torch.Tensor]
"""Attention output (batch, heads, tokens, head size), and log-sum-exp (batch, heads, tokens) in float32."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Attended]

BACKENDS = ("CUDNN", "FLASH_3", "FLASH", "SDPA_FLASH", "SDPA_EFFICIENT", "SDPA")
"""xDiT's lossless backends that return the log-sum-exp, fastest first."""

PROBE_TOLERANCE = 0.02
"""Relative error of a merged result in bfloat16. A log-sum-exp of another base or of unscaled scores exceeds it."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    backend: str,
    group: dist.ProcessGroup,
    valid: int | None = None,
) -> torch.Tensor:
    """Attend from this rank's queries to the keys of all ranks in ``group``: (batch, heads, tokens, head size).

    Every rank has equally many keys. Of all keys, in the order of ranks, the first ``valid`` count; the rest is
    padding. Every rank makes the same calls in the same order.
    """
    run = with_log_sum_exp(backend, query.device)
    ranks, rank, length = dist.get_world_size(group), dist.get_rank(group), key.shape[2]
    valid = ranks * length if valid is None else valid
    here = torch.stack([key, value])
    merged: Attended | None = None
    for turn in range(ranks):
        # Send before computing, so that a GPU does both at once.
        incoming, transfers = (None, []) if turn == ranks - 1 else _send_to_next(here, group)
        origin = (rank - turn) % ranks
        counted = min(length, valid - origin * length)
        part = run(query, here[0][:, :, :counted], here[1][:, :, :counted])
        merged = part if merged is None else merge(merged, part)
        for transfer in transfers:
            transfer.wait()
        if incoming is not None:
            here = incoming
    assert merged is not None
    return merged[0].to(query.dtype)


def merge(one: Attended, other: Attended) -> Attended:
    """Merge the attention of the same queries to two parts of the keys, in float32."""
    share = torch.sigmoid(other[1] - one[1]).unsqueeze(-1)
    return torch.lerp(one[0].float(), other[0].float(), share), torch.logaddexp(one[1], other[1])


@cache
def choose_backend(requested: str, device: torch.device) -> str:
    """Return the backend for ring attention: the requested one, or the first that runs here.

    The choice is cached, so that a GPU without free memory does not change it.

    Raises:
        Unsupported: the requested one returns no log-sum-exp, or a wrong one, or does not run here.
    """
    if requested.lower() != attention.AUTO:
        name = attention.check(requested, device)
        fault = "returns no log-sum-exp" if name not in BACKENDS else _probe(name, device)
        if fault:
            raise Unsupported(
                f"attention backend {requested!r} with ring attention: {fault}; use {_list_working(device)}"
            )
        return name
    for name in BACKENDS:
        fault = _probe(name, device)
        if not fault:
            return name
        logger.debug("not for ring attention: backend=%s fault=%s", name, fault)
    raise Unsupported(f"ring attention: no attention kernel on {device} returns its log-sum-exp; use ring=1")


def with_log_sum_exp(backend: str, device: torch.device) -> Attend:
    """Return the function of one of :data:`BACKENDS`."""
    if device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    # SDPA lets torch choose and returns no log-sum-exp; SDPA_EFFICIENT takes every dtype.
    known = AttentionBackendType["SDPA_EFFICIENT" if backend == "SDPA" else backend]
    function = ATTENTION_FUNCTION_REGISTRY[known]

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Attended:
        attended, log_sum_exp = function(query, key, value, dropout_p=0.0, is_causal=False)
        # Some kernels pad the log-sum-exp to a multiple of 32 rows.
        return attended, log_sum_exp.reshape(*query.shape[:2], -1)[:, :, : query.shape[2]].float()

    return run


def _send_to_next(part: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, list[dist.Work]]:
    """Begin to send ``part`` to the next rank, and to receive that of the previous one."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    incoming = torch.empty_like(part)
    next_rank = dist.get_global_rank(group, (rank + 1) % ranks)
    previous = dist.get_global_rank(group, (rank - 1) % ranks)
    return incoming, dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, part, next_rank, group),
            dist.P2POp(dist.irecv, incoming, previous, group),
        ]
    )


def _probe(backend: str, device: torch.device) -> str:
    """Attend to a few keys, then to two unequal parts of them; return the fault of the merged result, or ``""``."""
    generator = torch.Generator().manual_seed(0)
    tokens, cut = attention.PROBE_TOKENS, attention.PROBE_TOKENS // 2 + 1
    drawn = torch.randn(3, 1, 1, tokens, attention.HEAD_SIZE, generator=generator)
    query, key, value = drawn.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        if device.type == "cpu" and backend != "SDPA":
            return "runs on GPUs only"
        run = with_log_sum_exp(backend, device)
        whole = run(query, key, value)[0].float()
        parts = [run(query, key[:, :, part], value[:, :, part]) for part in (slice(cut), slice(cut, None))]
        error = float((merge(*parts)[0] - whole).norm() / whole.norm())
    except attention.PROBE_FAULTS as error_raised:
        return f"does not run here ({type(error_raised).__name__})"
    return "" if error <= PROBE_TOLERANCE else f"merges wrongly (relative error {error:.1e})"


def _list_working(device: torch.device) -> str:
    return ", ".join(name for name in BACKENDS if not _probe(name, device))
