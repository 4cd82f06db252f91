"""Warm up an announced model: run one forward on random weights before its client lends it.

The first forward of a process loads kernels of libraries, plans attention, connects the ranks, and shares memory
between GPUs. That takes longer than the forward itself, and does not need the client's weights. Weights of the same
shape and dtype are one tensor, so that all of them take a fraction of the model's memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import torch

from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import Bindings
from xditd.gpu_workers.models.fast_path_check import warming_up
from xditd.gpu_workers.models.operations import CallOptions, Inputs
from xditd.gpu_workers.parallel.rank_sync import agree, raise_on_all_ranks
from xditd.ipc.facts import ArgumentFacts
from xditd.ipc.outlines import OutlinedTensor
from xditd.ipc.transports.tensor_views import torch_dtype

logger = logging.getLogger(__name__)

ROOM_BYTES: Final = 8 * 2**30
"""Free memory of a GPU, beyond the announced weights, without which no model is warmed up: the client needs it soon."""


def can_warm_up(match: CheckpointMatch) -> bool:
    """Return whether a model that was built ahead can be warmed up on this rank.

    It can if it has had no weights, and its fast path has sizes for a warm-up.
    """
    return bool(match.model.warm_up_sizes) and not (match.needs_conversion or match.model.had_weights)


def is_due(match: CheckpointMatch, tensors: Collection[OutlinedTensor], *, is_lent: bool) -> bool:
    """Return whether a model is warmed up. All ranks call this together.

    It is if it can be on every rank, is not lent, and every GPU has enough free memory. Ranks may differ: one alone may
    have made the model anew, because its GPU was full.
    """
    return agree(can_warm_up(match) and not is_lent and _has_room(match, tensors))


def _has_room(match: CheckpointMatch, tensors: Collection[OutlinedTensor]) -> bool:
    announced = sum(torch_dtype(each.dtype).itemsize * torch.Size(each.shape).numel() for each in tensors)
    return torch.cuda.mem_get_info(match.model.device)[0] >= announced + ROOM_BYTES


def warm_up(match: CheckpointMatch, tensors: Collection[OutlinedTensor], sizes: Mapping[str, int]) -> None:
    """Run a forward with arguments of these ``sizes``, by their names in the facts. All ranks call this together.

    Afterwards the model has no weights, as before. The result is dropped, and the fast path check does not use it. What
    forwards keep for later ones (connections, memory between GPUs) stays.

    Raises:
        OutOfMemory, OtherRankFailed: a rank has no room for the weights.
    """
    # Imported here: it imports xfuser, which works only once it has started.
    from xditd.gpu_workers.models.calls import run_parts

    began_s = time.perf_counter()
    model, bindings, checkpoint = match.model, Bindings(), Bindings()
    operations = model.operations_for("transformer")
    try:
        with raise_on_all_ranks():
            made = _make(tensors, match.read_names, model.device)
            bindings |= match.bind(made)
            checkpoint |= match.by_canonical_name(made)
            del made
            model.plug(bindings, "", checkpoint)
            inputs = Inputs(
                {
                    each.name: _random(_sized(each, sizes), match.dtype, model.device)
                    for each in operations.facts(match.config, model.layout).arguments
                }
            )
            operations.check(model, inputs)
        with torch.inference_mode(), warming_up():
            run_parts(model, operations, [inputs], CallOptions())
    finally:
        if model.paths is not None:
            model.paths.drop_runs()
        model.unplug()
        bindings.clear()
        checkpoint.clear()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
            torch.cuda.empty_cache()  # the client needs it
    if model.layout.rank == 0:
        logger.info("model warmed up family=%s took_s=%.2f", match.family.name, time.perf_counter() - began_s)


def _make(tensors: Collection[OutlinedTensor], read: Collection[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Make random weights by name; those of one shape and dtype are one tensor."""
    needed = [each for each in tensors if each.name in read]
    by_shape = {
        (dtype, shape): _random(shape, torch_dtype(dtype), device)
        for dtype, shape in dict.fromkeys((each.dtype, each.shape) for each in needed)
    }
    return {each.name: by_shape[each.dtype, each.shape] for each in needed}


def _sized(argument: ArgumentFacts, sizes: Mapping[str, int]) -> list[int]:
    return [side if isinstance(side, int) else sizes[side] for side in argument.shape]


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return normal random numbers, scaled so that the values of a forward stay finite."""
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
    return torch.empty(tuple(shape), dtype=dtype, device=device).normal_(0.0, scale)
