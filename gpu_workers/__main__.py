"""Entry point of a worker group's leader. The daemon runs it; people run ``xditd serve``."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Final

import msgspec

from xditd.gpu_workers.process.die_with_parent import OUTPUT, die_with_parent, has_no_reader
from xditd.gpu_workers.process.garbage_collection import without_collections
from xditd.gpu_workers.process.lazy_meta_kernels import defer_meta_kernels
from xditd.gpu_workers.process.loopback import check_loopback
from xditd.gpu_workers.process.memory_priority import ended_first
from xditd.gpu_workers.process.options import Options, parse
from xditd.gpu_workers.process.start_faults import explain
from xditd.ipc.errors import XditdError
from xditd.ipc.network_watch import OutsideConnections
from xditd.ipc.worker_messages import (
    CONFIGURATION_STATUS,
    STANDBY_BEGINS,
    STANDBY_FLAG,
    STANDBY_IMPORTED,
    VERDICT_PREFIX,
)

logger = logging.getLogger(__name__)

STDIN: Final = 0
"""A socket for a leader that waits."""


def main() -> int:
    """Run a worker group until it ends; return the exit status. If it is not 0, a line on stderr says why."""
    die_with_parent(os.getppid())  # before the imports: the daemon may be killed while they take their seconds
    if has_no_reader(OUTPUT):  # it was killed already, and this process has another parent by now
        return 1
    outside = OutsideConnections.install()
    logging.basicConfig(level="INFO", format="%(levelname)s leader %(name)s: %(message)s")
    try:
        check_loopback()
        if sys.argv[1:] == [STANDBY_FLAG]:
            return _lead_later(outside)
        options = parse(sys.argv[1:])
        return _lead(options, _import_shared(is_standby=False), outside)
    except Exception as error:
        if not isinstance(error, XditdError):
            logger.exception("the leader failed")
        why, is_final = explain(error)
        with contextlib.suppress(BrokenPipeError):  # the daemon has ended
            print(f"{VERDICT_PREFIX}{why}", file=sys.stderr, flush=True)
        return CONFIGURATION_STATUS if is_final else 1


def _lead_later(outside: OutsideConnections) -> int:
    """Import everything, wait for the flags of a group, and run it; return the exit status."""
    with ended_first():  # the group that works is worth more
        _import_shared(is_standby=True)
        from xditd.gpu_workers.process import preload

        if preload.has_opened_gpu():
            print("an import has opened a GPU, whose memory a waiting leader must not hold", file=sys.stderr)
            return 1
        line = _wait_for_flags()
    if not line:
        return 0
    # Counted again: the group may have ended because a GPU was lost.
    return _lead(parse(msgspec.json.decode(line, type=list[str])), preload.count_gpus(), outside)


def _import_shared(*, is_standby: bool) -> int:
    """Import what ranks share; return the number of GPUs."""
    with without_collections():
        defer_meta_kernels()
        # Imported here, since they import torch: if torch is missing, the caller reports it.
        from xditd.gpu_workers.process import leader, preload  # noqa: F401

        gpus = preload.preload(preload.FOR_RANKS)
        if is_standby:
            preload.preload(preload.FOR_STANDBY)
        return gpus


def _lead(options: Options, gpus: int, outside: OutsideConnections) -> int:
    from xditd.gpu_workers.process import leader

    logging.getLogger().setLevel(options.log_level.upper())
    return leader.lead(options, gpus, outside.attempts)


def _wait_for_flags() -> str:
    """Tell the daemon that all imports are done, return the line with the flags, and tell that they have come.

    Empty if none come: the daemon has ended, or needs no other leader.
    """
    with contextlib.suppress(OSError):
        os.write(STDIN, STANDBY_IMPORTED)
        line = sys.stdin.readline()
        if line:
            os.write(STDIN, STANDBY_BEGINS)
        return line
    return ""


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # Not sys.exit: at its end the interpreter visits all that was imported, 1.7 s of processor time for which the next
    # group and the end of the daemon would wait. No rank is left by now.
    os._exit(status)
