"""Ring attention: keys and values travel from rank to rank, and each rank merges what its own queries see of them.

Exact, for every number of tokens: what a rank attends to of each part is weighed by its log-sum-exp, in float32, and
padding, which lies at the end of the last rank's part, is cut off wherever that part comes by. xfuser's own ring
(torch's ``_templated_ring_attention``) takes parts of one length only, and attention kernels of GPUs only.
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
"""What queries see, (batch, heads, tokens, head size), and its log-sum-exp, (batch, heads, tokens) in float32."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Attended]

BACKENDS = ("CUDNN", "FLASH_3", "FLASH", "SDPA_FLASH", "SDPA_EFFICIENT", "SDPA")
"""xDiT's lossless backends that tell the log-sum-exp; the fastest come first. The others keep it to themselves."""

PROBE_TOLERANCE = 0.02
"""Of a merged result, in bfloat16. A log-sum-exp of another base, or of scores without their scale, is far off."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    backend: str,
    group: dist.ProcessGroup,
    valid: int | None = None,
) -> torch.Tensor:
    """Attend from this rank's queries to the keys of every rank in ``group``: (batch, heads, tokens, head size).

    Keys are as many on every rank. ``valid`` is how many of all of them count, from the first rank's first on; the
    others lie at the last rank's end. Every rank makes the same calls in the same order.
    """
    run = with_log_sum_exp(backend, query.device)
    ranks, rank, length = dist.get_world_size(group), dist.get_rank(group), key.shape[2]
    valid = ranks * length if valid is None else valid
    here = torch.stack([key, value])
    merged: Attended | None = None
    for turn in range(ranks):
        # Sent on before it is attended to, so that a GPU copies while it computes.
        coming, transfers = (None, []) if turn == ranks - 1 else _pass_on(here, group)
        origin = (rank - turn) % ranks
        counted = min(length, valid - origin * length)
        part = run(query, here[0][:, :, :counted], here[1][:, :, :counted])
        merged = part if merged is None else merge(merged, part)
        for transfer in transfers:
            transfer.wait()
        if coming is not None:
            here = coming
    assert merged is not None
    return merged[0].to(query.dtype)


def merge(one: Attended, other: Attended) -> Attended:
    """Merge what the same queries see of two parts of the keys, in float32."""
    share = torch.sigmoid(other[1] - one[1]).unsqueeze(-1)
    return torch.lerp(one[0].float(), other[0].float(), share), torch.logaddexp(one[1], other[1])


@cache
def choose_backend(requested: str, device: torch.device) -> str:
    """Return the backend that rings attend with: the one asked for, or the first that runs here.

    It is found once in a process: a GPU that has become full meanwhile changes no choice.

    Raises:
        Unsupported: the one asked for tells no log-sum-exp, or a wrong one, or does not run here.
    """
    if requested.lower() != attention.AUTO:
        name = attention.check(requested, device)
        fault = "tells no log-sum-exp" if name not in BACKENDS else _probe(name, device)
        if fault:
            raise Unsupported(f"attention backend {requested!r} with ring attention: {fault}; use {_working(device)}")
        return name
    for name in BACKENDS:
        fault = _probe(name, device)
        if not fault:
            return name
        logger.debug("not for ring attention: backend=%s fault=%s", name, fault)
    raise Unsupported(f"ring attention: no attention kernel on {device} tells its log-sum-exp; use ring=1")


def with_log_sum_exp(backend: str, device: torch.device) -> Attend:
    """Return the function for one of :data:`BACKENDS`."""
    if device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    # SDPA is torch's choice, which tells nothing but the result; this one takes every dtype.
    known = AttentionBackendType["SDPA_EFFICIENT" if backend == "SDPA" else backend]
    function = ATTENTION_FUNCTION_REGISTRY[known]

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Attended:
        attended, log_sum_exp = function(query, key, value, dropout_p=0.0, is_causal=False)
        # Some kernels pad its rows to a multiple of 32.
        return attended, log_sum_exp.reshape(*query.shape[:2], -1)[:, :, : query.shape[2]].float()

    return run


def _pass_on(part: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, list[dist.Work]]:
    """Begin to send ``part`` to the next rank, and to receive the one of the rank before."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    coming = torch.empty_like(part)
    following = dist.get_global_rank(group, (rank + 1) % ranks)
    previous = dist.get_global_rank(group, (rank - 1) % ranks)
    return coming, dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, part, following, group),
            dist.P2POp(dist.irecv, coming, previous, group),
        ]
    )


def _probe(backend: str, device: torch.device) -> str:
    """Attend to all of a few keys, then to two unequal parts of them; say what is wrong with what they make."""
    generator = torch.Generator().manual_seed(0)
    tokens, cut = attention.PROBE_TOKENS, attention.PROBE_TOKENS // 2 + 1
    drawn = torch.randn(3, 1, 1, tokens, attention.HEAD_SIZE, generator=generator)
    query, key, value = drawn.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        if device.type == "cpu" and backend != "SDPA":
            return "runs on GPUs alone"
        run = with_log_sum_exp(backend, device)
        whole = run(query, key, value)[0].float()
        parts = [run(query, key[:, :, part], value[:, :, part]) for part in (slice(cut), slice(cut, None))]
        error = float((merge(*parts)[0] - whole).norm() / whole.norm())
    except attention.PROBE_FAULTS as error_raised:
        return f"does not run here ({type(error_raised).__name__})"
    return "" if error <= PROBE_TOLERANCE else f"merges wrongly (relative error {error:.1e})"


def _working(device: torch.device) -> str:
    return ", ".join(name for name in BACKENDS if not _probe(name, device))
