"""A program, not a test: lend packed checkpoints to two gloo ranks, run each, and write what rank 0 got.

    python packed_ranks.py OUT_FOLDER

The folder gets ``results.safetensors``, with a tensor for each model and format.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

FLUX1 = {"heads": 2, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 64}
SIZE = {"height": 48, "width": 48, "steps": 2}
Z_IMAGE = ([5, 9], [(4, 6), (6, 6)])


def flux1_given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(1, 7, 64, generator=generator),
        "pooled": torch.randn(1, 64, generator=generator),
        "noise": torch.randn(1, 16, 6, 6, generator=generator),
    }


def checkpoints() -> dict[str, Any]:
    """Both models in every format, the same in every process."""
    import z_image_models
    from packed_checkpoints import FORMATS, pack

    from xditd.client.demo.checkpoints import flux1_state_dict

    states = {"flux1": flux1_state_dict(0, **FLUX1), "z_image": z_image_models.state_dict(0)}
    return {f"{name}/{each}": pack(state, each, torch.float32) for name, state in states.items() for each in FORMATS}


def run_rank(rank: int, world_size: int, folder: str) -> None:
    import os

    import z_image_models
    from safetensors.torch import save_file

    from xditd.client.lending import describe
    from xditd.gpu_workers.models.components import Components
    from xditd.gpu_workers.models.operations import Inputs
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.processes import identify

    torch.set_num_threads(1)
    layout = xfuser_start.start(rank, world_size, f"{folder}/store", torch.device("cpu"))
    from direct_jobs import call, generate

    components = Components(layout, "", ("", ""))
    results: dict[str, torch.Tensor] = {}
    for case, packed in checkpoints().items():
        offer = describe(packed.save(Path(folder, f"rank{rank}.safetensors")), compute_dtype="float32")
        components.prepare(case, offer.manifest, identify(os.getpid()))
        model = components.plug(case).model
        if case.startswith("flux1"):
            results[case] = generate(model, **flux1_given(), **SIZE)
        else:
            [(found,)] = call(model, [Inputs(z_image_models.inputs(*Z_IMAGE))])
            results |= {f"{case}/{row}": each.contiguous() for row, each in enumerate(found)}
        components.unmap(case)
        offer.close()
    if rank == 0:
        save_file(results, f"{folder}/results.safetensors")
    xfuser_start.stop()


if __name__ == "__main__":
    tests = Path(__file__).parents[2]
    sys.path += [str(tests / "gpu_workers" / "support"), str(tests / "checkpoints")]
    from forked_ranks import fork_ranks

    fork_ranks(run_rank, 2, 2, sys.argv[1])
