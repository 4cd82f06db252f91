"""A program, not a test: run fused blocks on packed checkpoints in Triton's interpreter, and write what was found.

python interpreted_packed.py OUT_FILE STORE_FILE
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from inputs import GUIDANCE, job, reference_latents

sys.path.append(str(Path(__file__).parents[4] / "checkpoints"))

FORMATS = ("int8_convrot", "float8", "plain", "nvfp4")


MIXED = "mixed"
"""Norms, biases, and some plain weights in bfloat16 beside packed ones, as in GGUF files, which have float32 so."""


def narrow(packed: Any) -> None:
    """Make tensors bfloat16, which the fused blocks cast, some of them weights that are packed no longer."""
    for name in ("double_blocks.0.img_mlp.0.weight", "single_blocks.0.modulation.lin.weight", "img_in.weight"):
        for end in ("_scale", ""):
            packed.tensors.pop(name + end)
        packed.tensors.pop(name.replace("weight", "comfy_quant"))
        packed.tensors[name] = packed.meant[name]
    for name, tensor in packed.tensors.items():
        if name in packed.meant and tensor.dtype == torch.float32:
            packed.tensors[name] = tensor.bfloat16()
            packed.meant[name] = packed.tensors[name].float()


def run(store: str) -> dict[str, Any]:
    """Denoise with fused blocks, and compare with plain diffusers on what the weights mean."""
    from packed_checkpoints import pack

    from xditd.client.demo.checkpoints import flux1_state_dict
    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.process import xfuser_start

    layout = dataclasses.replace(xfuser_start.start(0, 1, store, torch.device("cpu")), fused_attention="SDPA")
    from direct_jobs import generate
    from one_rank import OneRank

    from xditd.client.lending import describe

    rank = OneRank(layout)
    given = job(5, 32, 32, 1)
    found: dict[str, Any] = {}
    state = flux1_state_dict(1, double_blocks=1, single_blocks=1)
    for name in (*FORMATS, MIXED):
        packed = pack(state, FORMATS[0] if name == MIXED else name, torch.float32)
        if name == MIXED:
            narrow(packed)
        offer = describe(packed.tensors, compute_dtype="float32")
        rank.components.prepare(name, offer.manifest, rank.client)
        model = rank.components.plug(name).model
        results = {
            foreseen: generate(model, **given, steps=2, guidance_scale=GUIDANCE, is_foreseen=foreseen)
            for foreseen in (True, False)
        }
        expected = reference_latents(reference.transformer_from(packed.meant), given, steps=2)
        (check,) = rank.components.models.take_checks()
        found[name] = {
            "error": reference.relative_error(results[True], expected),
            "same bits": torch.equal(results[True], results[False]),
            "used": check.is_used,
        }
        rank.components.unmap(name)
        offer.close()
    found["scratch"] = rank.components.models.packed.scratch.size_bytes
    rank.close()
    xfuser_start.stop()
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(sys.argv[2])))
