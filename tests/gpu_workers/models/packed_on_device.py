"""A program, not a test: lend packed checkpoints to one rank, run each, and write what was found as JSON.

    python packed_on_device.py OUT_FOLDER DEVICE

``DEVICE`` is ``cuda:0``, or ``cpu`` to try the program itself.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

SMALL = {"heads": 4, "double_blocks": 2, "single_blocks": 2, "context_dim": 256, "pooled_dim": 128}
FORMATS = ("float8", "int8", "int8_convrot", "mxfp8", "nvfp4", "plain")
NATIVE = ("float8", "int8", "int8_convrot")
SIZE = {"height": 128, "width": 128, "steps": 2}


def given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(1, 37, 256, generator=generator),
        "pooled": torch.randn(1, 128, generator=generator),
        "noise": torch.randn(1, 16, 16, 16, generator=generator),
    }


def main(folder: str, device: torch.device) -> None:
    from packed_checkpoints import pack

    from xditd.client.demo.checkpoints import flux1_state_dict
    from xditd.gpu_workers.process import xfuser_start

    started = xfuser_start.start(0, 1, f"{folder}/store", device, kernels="auto")
    state = flux1_state_dict(0, **SMALL)
    found: dict[str, Any] = {}
    if device.type == "cuda":  # cuBLAS takes memory in its first product, and keeps it
        torch.ones(32, 32, device=device) @ torch.ones(32, 32, device=device)
    for name in FORMATS:
        for dtype in (torch.float32, torch.bfloat16):
            packed = pack(state, name, dtype)
            path = packed.save(Path(folder, "x.safetensors"))
            case = f"{name} {str(dtype).removeprefix('torch.')}"
            for native in ("never", "always") if name in NATIVE else ("never",):
                layout = dataclasses.replace(started, native_products=native)
                found[f"{case} native" if native == "always" else case] = run(layout, path, packed.meant, dtype)
    Path(folder, "facts.json").write_text(json.dumps(found, indent=1))
    xfuser_start.stop()


def run(layout: Any, path: Path, meant: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Generate with a packed file twice, and compare with diffusers on what its weights mean, on the same device."""
    from direct_jobs import generate
    from one_rank import OneRank

    from xditd.client.lending import describe
    from xditd.gpu_workers.families.flux1 import reference

    device = layout.device
    before = allocated(device)
    rank = OneRank(layout)
    offer = describe(path, compute_dtype=str(dtype).removeprefix("torch."))
    rank.components.prepare("a", offer.manifest, rank.client)
    component = rank.components.plug("a")
    lent = allocated(device) - before
    results = [generate(component.model, **given(), **SIZE) for _ in range(2)]
    model = reference.transformer_from({name: each.to(device) for name, each in meant.items()})
    renamed = {"pooled_prompt_embeds" if name == "pooled" else name: each for name, each in given().items()}
    expected = reference.reference_latents(model, **renamed, **SIZE)
    (counts,) = rank.components.packed.counts.report()
    facts = {
        "error": reference.relative_error(results[0], expected),
        "same bits twice": torch.equal(*results),
        "native": counts.native,
        "reference": counts.reference,
        "detail": counts.why_not_native,
        "bytes": sum(component.facts.bytes_by_format.values()),
        "scratch": component.facts.scratch_bytes,
        "lent": lent,
        "checks": {check.kernels: check.is_used for check in rank.components.models.take_checks()},
    }
    del component, model, results, expected
    rank.close()
    offer.close()
    facts["left"] = allocated(device) - before
    return facts


def allocated(device: torch.device) -> int:
    gc.collect()  # modules hold each other
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


if __name__ == "__main__":
    tests = Path(__file__).parents[2]
    sys.path += [str(tests / "gpu_workers" / "support"), str(tests / "checkpoints")]
    main(sys.argv[1], torch.device(sys.argv[2]))
