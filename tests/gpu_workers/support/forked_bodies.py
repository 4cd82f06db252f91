"""Run pieces of a program, each in a process that is forked from one with a rank's first imports."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

PROGRAM = """
import json, os, signal, sys, warnings
import torch
from xditd.gpu_workers.process import lazy_transformers, lean_imports, xfuser_cpu
lean_imports.leave_out_peft()
with xfuser_cpu.importable():
    lean_imports.import_xfuser()
"""
IN_A_CHILD = """
if not (child := os.fork()):
    found = {{}}
{body}
    print(json.dumps([{number}, found]), file=sys.__stdout__, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
Run = Callable[[str], Any]
"""Returns what a body has put into ``found``."""


def run_bodies(bodies: tuple[str, ...]) -> Run:
    """Run all bodies, one after the other."""
    children = (
        IN_A_CHILD.format(number=number, body=textwrap.indent(body, "    ")) for number, body in enumerate(bodies)
    )
    program = PROGRAM + "".join(children)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    results = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))

    def find(body: str) -> Any:
        number = bodies.index(body)
        assert number in results, done.stderr[-4000:]
        return results[number]

    return find
