"""``python -m xditd.gpu_workers.process.probe``: print this machine's GPUs, packages and attention backends as JSON.

``xditd doctor`` runs it in a process of its own, since it imports torch and makes a CUDA context: if the driver hangs
or crashes, only this process ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from xditd.ipc.errors import XditdError

PACKAGES: Final = (
    "torch",
    "xfuser",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "comfy-kitchen",
    "triton",
    "safetensors",
    "cuda-bindings",
)


def main() -> int:
    # Libraries print while they are imported, so the answer goes to a copy of stdout and their output to stderr.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    facts = {"packages": _packages(), **_torch_facts(), **_attention_facts()}
    print(json.dumps(facts), file=answer, flush=True)
    return 0


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _torch_facts() -> dict[str, Any]:
    """Return the GPUs, the pairs with peer access, and the CUDA version; ``error`` is why torch cannot tell."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"gpus": [], "peers": [], "error": f"torch cannot be imported: {error}"}
    facts: dict[str, Any] = {"gpus": [], "peers": [], "error": "", "cuda": torch.version.cuda or ""}
    try:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            free_bytes, total_bytes = torch.cuda.mem_get_info(index)
            facts["gpus"].append(
                {
                    "index": index,
                    "name": found.name,
                    "uuid": f"GPU-{found.uuid}",
                    "capability": f"{found.major}.{found.minor}",
                    "free_bytes": free_bytes,
                    "total_bytes": total_bytes,
                }
            )
        count = len(facts["gpus"])
        facts["peers"] = [
            [a, b] for a in range(count) for b in range(count) if a != b and torch.cuda.can_device_access_peer(a, b)
        ]
    except (RuntimeError, AssertionError) as error:  # a driver that is missing, too old, or broken
        facts["error"] = str(error).splitlines()[0]
    return facts


def _attention_facts() -> dict[str, Any]:
    """Return the attention that the workers choose here, and all backends that run, each tried on a few tokens.

    ``attention_plain`` is that of diffusers' modules, ``attention_fused`` that of fused kernels, empty without them.
    """
    try:
        import torch

        from xditd.gpu_workers.parallel import attention, peer_memory
        from xditd.gpu_workers.process import lean_imports, xfuser_cpu

        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        with contextlib.nullcontext() if device.type == "cuda" else xfuser_cpu.importable():
            lean_imports.import_xfuser()  # registers the backends
        plain, fused = attention.automatic(device)
        if not peer_memory.is_possible(torch.cuda.device_count()):
            fused = None
        return {
            "attention": attention.working(device),
            "attention_plain": plain,
            "attention_fused": fused or "",
            "attention_error": "",
        }
    except XditdError as error:
        return {"attention": [], "attention_error": error.detail}
    except (ImportError, OSError, RuntimeError) as error:
        return {"attention": [], "attention_error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
