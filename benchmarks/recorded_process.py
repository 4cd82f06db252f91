"""Record the kernels of this process: copied as ``sitecustomize.py`` into a folder that is first in ``PYTHONPATH``.

While there is a file ``record`` in that folder, each process that uses a GPU records its kernels by torch's profiler,
from a thread of its own, and then writes them to ``PID.json`` as a Chrome trace. See ``kernel_profile``.
"""

import os
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
POLL_S = 0.02


def record() -> None:
    flag, ready = FOLDER / "record", FOLDER / f"{os.getpid()}.ready"
    while True:
        time.sleep(POLL_S)
        torch = sys.modules.get("torch")
        if not flag.exists() or torch is None or not torch.cuda.is_initialized():
            continue
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            ready.touch()
            while flag.exists():
                time.sleep(POLL_S)
        written = FOLDER / f"{os.getpid()}.writing"
        recorded.export_chrome_trace(str(written))
        written.rename(FOLDER / f"{os.getpid()}.json")
        ready.unlink()


threading.Thread(target=record, daemon=True, name="kernel record").start()
