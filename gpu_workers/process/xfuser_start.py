"""Start torch.distributed and xDiT for one rank."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.registry import own_families
from xditd.gpu_workers.parallel import attention, rank_sync, ring, sequence_groups
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.process import cpu_convolutions, lean_imports, xfuser_cpu
from xditd.ipc import layout_choice
from xditd.ipc.degrees import Degrees
from xditd.ipc.errors import Unsupported
from xditd.ipc.settings.daemon import WORKER_DEFAULTS, NativeProducts

logger = logging.getLogger(__name__)

LOOPBACK = "lo"
GROUP_TIMEOUT = timedelta(days=7)
"""How long ranks wait for each other, at start and in a collective: only the daemon has deadlines. gloo, NCCL and the
store count time in which all ranks were stopped (SIGSTOP, a frozen container), and would end a healthy group."""


def start(
    rank: int,
    world_size: int,
    store_path: str,
    device: torch.device,
    degrees: Degrees | None = None,
    attention_backend: str = attention.AUTO,
    kernels: str = "plain",
    precision: str = WORKER_DEFAULTS.precision,
    acceleration: str = WORKER_DEFAULTS.acceleration,
    native_products: NativeProducts = WORKER_DEFAULTS.native_products,
) -> ParallelLayout:
    """Join the process group at ``store_path`` and start xDiT in it. Models can be built afterwards.

    Call once per process. ``store_path`` is a file that does not exist yet or is empty, and that only this user can
    open; all ranks name the same one. ``degrees`` multiply to ``world_size``; without them ``choose_layout`` chooses.
    A component whose attention heads do not fit them gets others (``component_layouts``).
    ``kernels`` is ``plain``, ``fused``, or ``auto``: fused where possible.
    ``precision`` is ``bf16``, or ``fp8`` on fused kernels. ``acceleration`` is that of forwards (``forward_paths``),
    ``native_products`` that of packed weights (``product_choice``).

    Raises:
        Unsupported: no layout fits, an attention backend is not installed, or fused kernels or products in eight bits
            do not run here.
    """
    clock = Clock()
    degrees = layout_choice.choose_layout(world_size).degrees if degrees is None else degrees
    if device.type == "cuda":
        # Before xfuser is imported: it asks for the current GPU then, and every rank would open a context on GPU 0.
        torch.cuda.set_device(device)
    else:
        cpu_convolutions.install(cpu_convolutions.slow_dtypes())
    _import_xfuser(device)
    clock.mark("imports")
    store = _join(rank, world_size, store_path, device)
    rank_sync.share_page(store, "xditd/rank_sync", rank, world_size)
    image, place = divmod(rank, degrees.sequence)
    rank_sync.share_page(store, f"xditd/rank_sync/{image}", place, degrees.sequence, rank_sync.RankSet.SEQUENCE)
    clock.mark("group")
    backend = _start_xdit(rank, degrees, device, attention_backend)
    clock.mark("xdit")
    fused_attention = _start_fused(rank, degrees, device, attention_backend, backend, kernels, precision)
    _set_timeouts()
    clock.mark("kernels")
    # The libraries' 430,000 objects live as long as the process. Without this every full collection visits them, which
    # takes 0.2 s and may happen during a lend.
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else triton's bindings report leaks at exit
    clock.mark("freeze")
    took = " ".join(f"{phase}_s={took_ms / 1e3:.2f}" for phase, took_ms in clock.marks_ms.items())
    logger.info("rank started rank=%d %s", rank, took)
    return ParallelLayout(
        rank,
        degrees,
        device,
        backend,
        fused_attention,
        precision,
        attention_backend,
        kernels,
        acceleration,
        native_products,
    )


def stop() -> None:
    """Leave the process group. The process cannot start another one; it is about to exit."""
    from xfuser.core.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def _import_xfuser(device: torch.device) -> None:
    with xfuser_cpu.importable() if device.type == "cpu" else contextlib.nullcontext():
        lean_imports.import_xfuser()


def _join(rank: int, world_size: int, store_path: str, device: torch.device) -> dist.Store:
    # Listen on loopback only. The parent sets these too, but not for a rank that is started by hand.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    store = dist.FileStore(store_path, world_size)
    store.set_timeout(GROUP_TIMEOUT)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=GROUP_TIMEOUT,
        # No device_id, although torch recommends it: with it NCCL makes communicators by splitting, eagerly, and
        # xfuser reports (core/distributed/parallel_state.py) that its new_group calls then fail. set_device above
        # already binds every communicator of this rank to the one GPU that it uses.
    )
    return store


def _set_timeouts() -> None:
    """Set :data:`GROUP_TIMEOUT` for xfuser's groups, too: it makes them with torch's own, 10 or 30 minutes."""
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(GROUP_TIMEOUT, group)


def _start_xdit(rank: int, degrees: Degrees, device: torch.device, attention_backend: str) -> str:
    from xfuser.config.args import xFuserArgs
    from xfuser.core.distributed import runtime_state
    from xfuser.core.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    collectives = "nccl" if device.type == "cuda" else "gloo"
    local_rank = (device.index or 0) if device.type == "cuda" else rank
    init_distributed_environment(world_size=degrees.world_size, rank=rank, local_rank=local_rank, backend=collectives)
    initialize_model_parallel(
        classifier_free_guidance_degree=degrees.cfg,
        sequence_parallel_degree=degrees.sequence,
        ulysses_degree=degrees.ulysses,
        ring_degree=degrees.ring,
        backend=collectives,
    )
    sequence_groups.start(degrees, GROUP_TIMEOUT)
    # The ring is our own (ring.py) and takes more backends than xfuser's, so xfuser gets a neutral name here.
    wanted = ring.choose_backend(attention_backend, device) if degrees.ring > 1 else None
    config, _ = xFuserArgs(
        use_cfg_parallel=degrees.cfg > 1,
        ulysses_degree=degrees.ulysses,
        ring_degree=degrees.ring,
        attention_backend="SDPA_FLASH" if wanted else attention.requested(attention_backend, device),
    ).create_config()
    try:
        runtime_state.initialize_runtime_state(_nominal_pipeline(degrees.ulysses), config)
    except RuntimeError as error:  # xfuser refuses this backend in this layout
        raise Unsupported(f"attention backend {attention_backend!r}: {error}") from error
    state = runtime_state.get_runtime_state()
    # The attention of single blocks reads this, and uses it with xfuser's PipeFusion alone. set_input_parameters would
    # set it too, but refuses every size whose rows of tokens do not divide by the degree.
    state.max_condition_sequence_length = 0
    if wanted is not None:
        attention.use(wanted)
    chosen = str(state.attention_backend.name)
    attention.check(chosen, device)
    logger.info("xdit started rank=%d world_size=%d layout=%s attention=%s", rank, degrees.world_size, degrees, chosen)
    return chosen


def _start_fused(
    rank: int,
    degrees: Degrees,
    device: torch.device,
    requested_attention: str,
    attention_backend: str,
    kernels: str,
    precision: str,
) -> str | None:
    """Choose the attention of fused transformers and compile their kernels; ``None``: run plain modules.

    Raises:
        Unsupported: fused kernels, or products in eight bits, were asked for by name and do not run here.
    """
    is_lossless = precision == "bf16"
    if not is_lossless and (kernels == "plain" or device.type == "cpu"):
        where = "the CPU" if device.type == "cpu" else "kernels 'plain'"
        raise Unsupported(f"precision {precision!r} needs fused kernels on NVIDIA GPUs, not {where}; use bf16")
    if kernels == "plain" or (kernels == "auto" and device.type == "cpu"):
        return None
    if device.type == "cpu":
        raise Unsupported("kernels 'fused' need NVIDIA GPUs; use auto or plain")
    asked, instead = ("kernels 'fused'", "plain") if is_lossless else (f"precision {precision!r}", "bf16")
    is_asked = kernels == "fused" or not is_lossless
    if degrees.ring > 1:
        if is_asked:
            raise Unsupported(
                f"{asked} with layout {degrees}: fused kernels have no ring attention; use ring=1 or {instead}"
            )
        logger.warning("fused kernels are off: they have no ring attention, and the layout is %s", degrees)
        return None
    from xditd.gpu_workers.kernels import warm_up
    from xditd.gpu_workers.kernels.products import check_eight_bits
    from xditd.gpu_workers.parallel import peer_memory

    if not peer_memory.is_possible(degrees.world_size):
        if is_asked:
            raise Unsupported(f"{asked} needs peer access between the GPUs, which these do not have; use {instead}")
        logger.warning("fused kernels are off: the GPUs have no peer access to each other")
        return None
    chosen = attention.for_fused(requested_attention, attention_backend, device)
    if precision == "fp8":
        check_eight_bits(device)
    took_s = sum(
        warm_up.compile_kernels(width, rank % degrees.sequence, degrees.sequence, device, precision)
        for width in sorted({width for family in own_families() for width in family.fused_widths})
    )
    logger.info("fused kernels ready rank=%d attention=%s precision=%s took_s=%.2f", rank, chosen, precision, took_s)
    return chosen


def _nominal_pipeline(heads: int) -> SimpleNamespace:
    """Return a stand-in for the pipeline that xDiT's runtime state reads.

    The state is made once per process, before any model is lent. It needs patch size and widths for PipeFusion alone,
    which is not used here. It divides ``heads`` by the Ulysses degree.
    """
    config = SimpleNamespace(num_attention_heads=heads, attention_head_dim=1, in_channels=1, patch_size=1)
    return SimpleNamespace(transformer=SimpleNamespace(config=config))
