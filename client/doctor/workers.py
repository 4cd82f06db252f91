"""Check the workers' libraries, GPUs, peer access and attention, by a probe in a child process."""

from __future__ import annotations

import json
import subprocess
from typing import Any, Final

from xditd.client.doctor.findings import Finding, fail, ok, warn
from xditd.client.doctor.layout import describe_default_layout
from xditd.client.subprograms import module_command, module_environment
from xditd.ipc.name_lists import listed

PROBE_DEADLINE_S: Final = 180.0
"""Importing xfuser takes most of the time: seconds on a warm disk, a minute on a cold or busy one."""

NEEDED: Final = ("torch", "xfuser", "diffusers", "transformers", "accelerate", "triton", "safetensors")
OPTIONAL: Final = ("peft", "comfy-kitchen")
_GIB: Final = 2**30


def probe() -> dict[str, Any] | str:
    """Run ``xditd.gpu_workers.process.probe``; returns its facts, or the reason why it failed."""
    # Like the daemon for its workers: they do not use the allocator settings of this shell.
    environ = {key: value for key, value in module_environment().items() if not key.startswith("PYTORCH_")}
    command = module_command("xditd.gpu_workers.process.probe", [])
    try:
        # In a folder that exists: importing torch fails in one that was removed.
        done = subprocess.run(
            command, cwd="/", env=environ, capture_output=True, text=True, timeout=PROBE_DEADLINE_S, check=False
        )
        if done.returncode == 0:
            return dict(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_DEADLINE_S:.0f} s: the disk is very slow, or the driver hangs (dmesg)"
    except ValueError:
        return f"the probe's output is not JSON: {done.stdout[:200]!r}"
    last = done.stderr.strip().splitlines()[-1:] or ["no output"]
    return f"status {done.returncode}: {last[0]}"


def check_workers(facts: dict[str, Any] | str, *, has_layout: bool = True) -> list[Finding]:
    """Convert the probe's facts to findings; with ``has_layout`` also that of a daemon that is yet to be started."""
    if isinstance(facts, str):
        return [fail("workers' libraries", facts, "pip install 'xditd[workers]' into the environment of the daemon")]
    packages = facts["packages"]
    missing = [name for name in NEEDED if name not in packages]
    if missing:
        return [
            fail(
                "workers' libraries",
                f"not installed: {', '.join(missing)}",
                "pip install 'xditd[workers]' (a client alone does not need them)",
            )
        ]
    found = [
        ok(
            "workers' libraries",
            ", ".join(f"{name} {packages[name]}" for name in (*NEEDED, *OPTIONAL) if name in packages),
        )
    ]
    found += _check_gpus(facts)
    found.append(_check_attention(facts))
    if has_layout:
        found.append(describe_default_layout(len(facts["gpus"])))
    return found


def _check_gpus(facts: dict[str, Any]) -> list[Finding]:
    gpus, built_for = facts["gpus"], facts.get("cuda", "")
    if facts["error"]:
        return [fail("driver", facts["error"], "install an NVIDIA driver that fits torch's CUDA, and restart")]
    if not gpus:
        why = f"torch is built for CUDA {built_for} and sees no GPU" if built_for else "torch is built without CUDA"
        return [
            warn(
                "GPUs",
                f"{why}: workers run on the CPU",
                "for GPUs: a driver (nvidia-smi), a torch for CUDA, and CUDA_VISIBLE_DEVICES unset",
            )
        ]
    lines = ", ".join(
        f"{gpu['name']} ({gpu['free_bytes'] / _GIB:.0f} of {gpu['total_bytes'] / _GIB:.0f} GiB free, {gpu['uuid']})"
        for gpu in gpus
    )
    found = [ok("GPUs", lines), ok("driver", f"answers; torch is built for CUDA {built_for}")]
    if "cuda-bindings" not in facts["packages"]:
        found.append(fail("cuda-bindings", "not installed: CUDA memory cannot be lent", "pip install 'xditd[cuda]'"))
    found.append(_check_peers(len(gpus), facts["peers"]))
    return found


def _check_peers(count: int, peers: list[list[int]]) -> Finding:
    if count == 1:
        return ok("peer access", "one GPU: none needed")
    missing = [f"{a}-{b}" for a in range(count) for b in range(count) if a < b and [a, b] not in peers]
    if missing:
        return warn(
            "peer access",
            f"GPUs {listed(missing)} have no direct access to each other: copies go through the host",
            "see nvidia-smi topo -m; ACS or IOMMU settings of a virtual machine may prevent it",
        )
    return ok("peer access", f"all {count} GPUs access each other directly")


def _check_attention(facts: dict[str, Any]) -> Finding:
    if facts["attention"]:
        plain, fused = facts["attention_plain"], facts["attention_fused"]
        runs = f"{fused} in fused kernels, {plain} in other modules" if fused and fused != plain else plain
        others = ", ".join(name for name in facts["attention"] if name not in (plain, fused)) or "nothing else"
        return ok("attention", f"auto runs {runs}; also here: {others}")
    why = facts["attention_error"] or "no backend ran"
    return fail("attention", why, "reinstall torch and xfuser for this machine (pip install 'xditd[workers]')")
