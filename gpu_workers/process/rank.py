"""Entry point of one rank: start xDiT, then run the daemon's commands until ``Shutdown``."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from xditd.gpu_workers.process import lean_imports, preload, start_faults, thread_room, xfuser_start
from xditd.gpu_workers.process.command_loop import CommandLoop, DaemonChannel
from xditd.gpu_workers.process.die_with_parent import die_with_parent
from xditd.gpu_workers.process.options import Options
from xditd.ipc.errors import RequestError
from xditd.ipc.layout_choice import LayoutChoice, report
from xditd.ipc.network_watch import OutsideConnections
from xditd.ipc.processes import age_s
from xditd.ipc.worker_messages import CONFIGURATION_STATUS

logger = logging.getLogger(__name__)


def main(
    options: Options,
    rank: int,
    choice: LayoutChoice,
    device: str,
    error_pipe: Connection,
    leader_pid: int,
    store_path: str,
    attempts: Sequence[str],
) -> None:
    """Run one rank. If it cannot start, it writes the reason to ``error_pipe``.

    ``store_path`` is the file of torch's FileStore, empty and made by the leader; ``attempts`` are the connections to
    other hosts that the leader has tried.
    """
    die_with_parent(leader_pid)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork inherits the leader's handler
    logging.basicConfig(
        level=options.log_level.upper(), format=f"%(levelname)s rank{rank} %(name)s: %(message)s", force=True
    )
    logger.info("rank process runs rank=%d process_s=%.2f", rank, age_s())
    outside = OutsideConnections.install()
    outside.attempts.extend(attempts)
    preload.quiet_libraries()
    where = torch.device(device)
    # With GPUs the host only copies small tensors, and waking sixteen threads for that took up to 10 ms.
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // choice.degrees.world_size) if where.type == "cpu" else 1)
    try:
        thread_room.check_threads(thread_room.THREADS_OF_A_RANK)
        lean_imports.leave_out_peft()
        layout = xfuser_start.start(
            rank,
            choice.degrees.world_size,
            store_path,
            where,
            choice.degrees,
            options.attention_backend,
            options.kernels,
            options.precision,
            options.acceleration,
            options.native_products,
        )
        # Imported here: its modules import xfuser, which works only after start().
        from xditd.gpu_workers.process.torch_executor import TorchExecutor

        group = hashlib.blake2b(options.group_token.encode(), digest_size=8).hexdigest()  # the token itself is secret
        executor = TorchExecutor(layout, report(choice, options.degrees), outside, group)
    except Exception as error:
        if not isinstance(error, RequestError):
            logger.exception("rank cannot start rank=%d", rank)
        why, is_final = start_faults.explain(error)
        error_pipe.send_bytes(why.encode()[: start_faults.MAX_DETAIL_BYTES])
        sys.exit(CONFIGURATION_STATUS if is_final else 1)
    CommandLoop(DaemonChannel(options.runtime_dir), executor, options.group_token).serve()
    xfuser_start.stop()
