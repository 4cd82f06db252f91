"""One worker group, measured from a client that lends to it: parts of the suite are walks of this program.

    python benchmarks/workers_part.py --workers 2 --files FOLDER --out FILE
    python benchmarks/workers_part.py --workers 2 --walk jobs --flags=--layout=ring=2 --files FOLDER --out FILE

The client uses ``cudaMallocAsync`` as ComfyUI does; the daemon is started here, with ``--flags`` of its own. The walk
``whole`` is everything, ``jobs`` is what shows another way of computing. A stage that fails is named, and the next
one goes on. All times are the client's, unless their name says that they are the workers' (of the slowest rank).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Before torch is imported: the allocator that ComfyUI selects by default, under which torch itself refuses to share.
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
os.environ["PYTORCH_ALLOC_CONF"] = "backend:cudaMallocAsync"

from measuring import Report, add_arguments

from xditd.client.demo.daemon_process import DaemonProcess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--walk", choices=("whole", "jobs"), default="whole")
    parser.add_argument("--flags", action="append", default=[], help="one of the daemon, --flags=--name=value")
    parser.add_argument("--step-cache", type=float, default=0.0, help="threshold of step caching in jobs")
    parser.add_argument("--lends", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold-clients", type=int, default=5)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    report = Report(given.out)
    log = given.out.with_suffix(".daemon.log")
    given.began = time.perf_counter()
    daemon = DaemonProcess(log, given.workers, given.device, given.flags)
    try:
        from workers_walk import WALKS, Walk  # torch and the rest, while the workers import theirs

        walk = Walk(given, report, daemon)
        walk.run(WALKS[given.walk])
        walk.close()
    finally:
        daemon.stop(None)
    if "start" in walk.failed:
        sys.exit(walk.failed["start"])


if __name__ == "__main__":
    main()
