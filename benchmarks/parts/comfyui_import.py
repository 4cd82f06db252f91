"""Time the import of the node pack, which it adds to ComfyUI's start, in new processes.

    COMFYUI_PATH=~/ComfyUI python benchmarks/run.py comfyui_import

ComfyUI imports torch, its own modules and ``comfy_api`` before custom nodes, so their time does not count. Without
``COMFYUI_PATH`` only the pack's root package is measured. The limit is 0.2 s.

Needs: a checkout of ComfyUI, for all but the pack's root
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from measuring import Report, print_table

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


def seconds(repeats: int, code: str, *arguments: str) -> list[float]:
    command = [sys.executable, "-c", code, *arguments]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repeats)]
    return [float(run.stdout.split()[-1]) for run in runs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="a checkout of ComfyUI")


def run(given: argparse.Namespace, report: Report) -> None:
    found = {"the pack's root": seconds(given.repeats, ROOT)}
    if given.comfyui:
        found["all nodes, inside ComfyUI"] = seconds(given.repeats, WHOLE, given.comfyui)
    report.add(seconds=found)
    rows = [(name, f"{min(runs):.3f} s", f"{statistics.median(runs):.3f} s") for name, runs in found.items()]
    print_table("", [("", "best", "median"), *rows])
