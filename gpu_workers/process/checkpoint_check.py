"""``python -m xditd.gpu_workers.process.checkpoint_check``: match manifests as a rank does, and print facts as JSON.

``xditd models check`` runs it in a process of its own, since it imports torch and diffusers. It reads a JSON list of
:class:`~xditd.ipc.tensors.Manifest` from stdin, builds each model without weights on the CPU, as the only rank of a
group would, and prints a list with the facts of each, or the error that lending it would give. No tensor is read.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Any

import msgspec
import torch

from xditd.gpu_workers.models.class_models import ClassModels
from xditd.gpu_workers.models.matching import match_manifest
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.gpu_workers.process import lean_imports, xfuser_cpu
from xditd.ipc.degrees import Degrees
from xditd.ipc.errors import XditdError
from xditd.ipc.tensors import Manifest


def main() -> int:
    # Libraries print while they are imported, so the answer goes to a copy of stdout and their output to stderr.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    manifests = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Manifest])
    with xfuser_cpu.importable():
        lean_imports.import_xfuser()  # families' operations import it
        found = check(manifests)
    print(json.dumps(found), file=answer, flush=True)
    return 0


def check(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """Return ``{"facts": ...}`` of each manifest, or ``{"error": {"code", "message", "names"}}``."""
    layout = ParallelLayout(0, Degrees(), torch.device("cpu"), "none")
    models, class_models = ModelCache(layout), ClassModels(layout)
    found: list[dict[str, Any]] = []
    for manifest in manifests:
        try:
            facts = match_manifest(manifest, models, class_models).facts(manifest)
        except XditdError as error:
            found.append({"error": {"code": error.code, "message": error.detail, "names": list(error.names)}})
        else:
            found.append({"facts": msgspec.to_builtins(facts)})
    return found


if __name__ == "__main__":
    sys.exit(main())
