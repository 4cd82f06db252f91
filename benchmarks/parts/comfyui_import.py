"""What the node pack adds to the start of ComfyUI, measured in processes of their own.

    COMFYUI_PATH=~/ComfyUI python benchmarks/comfyui_import.py

ComfyUI imports torch, its own modules and ``comfy_api`` before it looks at custom nodes, so their time is not the
pack's. Without ``COMFYUI_PATH`` only the pack's root is measured.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

RUNS = 5
ROOT = "import time; t = time.perf_counter(); import xditd.client.comfyui; print(time.perf_counter() - t)"
WHOLE = """\
import asyncio, sys, time
sys.path.insert(0, sys.argv[1])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.sd, comfy_api.latest, latent_preview, nodes
t = time.perf_counter()
import xditd.client.comfyui
async def load():
    for node in await (await xditd.client.comfyui.comfy_entrypoint()).get_node_list():
        node.GET_SCHEMA()
asyncio.run(load())
print(time.perf_counter() - t)
"""


def seconds(code: str, *arguments: str) -> list[float]:
    command = [sys.executable, "-c", code, *arguments]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(RUNS)]
    return sorted(float(run.stdout.split()[-1]) for run in runs)


def main() -> None:
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores; {RUNS} runs, best and median, bar 0.200 s")
    rows = {"the pack's root": seconds(ROOT)}
    path = os.environ.get("COMFYUI_PATH")
    if path:
        rows["all nodes, inside ComfyUI"] = seconds(WHOLE, path)
    for name, found in rows.items():
        print(f"{name:28} {found[0]:.3f} s   {found[len(found) // 2]:.3f} s")


if __name__ == "__main__":
    main()
