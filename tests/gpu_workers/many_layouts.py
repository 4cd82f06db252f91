"""A program, not a test: denoise a few batches in every kind of layout, on gloo ranks, and write what each rank got.

    python many_layouts.py OUT_FOLDER

Each rank of each layout writes ``<layout>/rank<N>.safetensors`` with ``<case>/<round>`` tensors. xfuser is imported
once, and the ranks are forked from there: importing is most of what a group's start costs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

SEED = 0
ROUNDS = 2
GUIDANCE = 3.5
MODEL = {"heads": 4, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 32}

LAYOUTS = (
    "ring=2",
    "cfg=2",
    "ring=3",
    "ulysses=2,ring=2",
    "ulysses=2,cfg=2",
    "ulysses=4,ring=2",
    "ulysses=2,ring=2,cfg=2",
)

# name: text tokens, latent height, latent width, rows
CASES = {
    "all divide": (16, 16, 16, 1),
    "odd text, odd image": (15, 14, 14, 1),
    "odd total": (16, 14, 14, 2),
    "odd text, three rows": (13, 8, 12, 3),
}

# name: the cases of one latent size whose rows share a request
JOINED = {
    "other lengths": ("odd text, odd image", "odd total"),
    "other lengths, the longer first": ("odd total", "odd text, odd image"),
}


def inputs(tokens: int, height: int, width: int, rows: int) -> dict[str, torch.Tensor]:
    """The tensors of a case, the same in every process; each row has a sigma and a guidance of its own."""
    generator = torch.Generator().manual_seed(tokens * 10_000 + height + width + rows)
    return {
        "prompt_embeds": torch.randn(rows, tokens, MODEL["context_dim"], generator=generator),
        "pooled": torch.randn(rows, MODEL["pooled_dim"], generator=generator),
        "latents": torch.randn(rows, 16, height, width, generator=generator),
        "timestep": torch.linspace(0.7, 0.4, rows),
        "guidance": torch.linspace(GUIDANCE, 1.0, rows),
    }


def run_rank(rank: int, layout: str, state: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    from xditd.gpu_workers import pipelines, xfuser_start
    from xditd.gpu_workers.families.base import TensorInfo
    from xditd.gpu_workers.skeletons import SkeletonCache
    from xditd.ipc.degrees import Degrees, parse_layout

    torch.set_num_threads(1)
    degrees = Degrees(**parse_layout(layout))
    started = xfuser_start.start(rank, degrees.world_size, str(folder / "store"), torch.device("cpu"), degrees)
    plan = SkeletonCache(started).plan({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    plan.skeleton.plug(plan.bind(state))

    def batch(case: str) -> pipelines.Batch:
        given = inputs(*CASES[case])
        conditioning = pipelines.condition(
            plan.skeleton, prompt_embeds=given.pop("prompt_embeds"), pooled=given.pop("pooled")
        )
        return pipelines.Batch(conditioning=conditioning, **given)

    results = {
        f"{name}/{attempt}": pipelines.denoise_batches(plan.skeleton, [batch(case) for case in cases])
        for name, cases in ({case: (case,) for case in CASES} | JOINED).items()
        for attempt in range(ROUNDS)
    }
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"rank{rank}.safetensors")
    xfuser_start.stop()


def main(out: Path) -> None:
    from xditd.client.demo import checkpoints
    from xditd.gpu_workers import xfuser_cpu
    from xditd.ipc.degrees import Degrees, parse_layout

    with xfuser_cpu.importable():
        import xditd.gpu_workers.pipelines
        import xditd.gpu_workers.sequence_parallel  # noqa: F401 - what ranks would import one by one

    state = checkpoints.flux1_state_dict(SEED, **MODEL)
    fork = torch.multiprocessing.get_context("fork")
    for layout in LAYOUTS:
        folder = out / layout
        folder.mkdir()
        ranks = [
            fork.Process(target=run_rank, args=(rank, layout, state, folder), daemon=True)
            for rank in range(Degrees(**parse_layout(layout)).world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"{layout}: ranks ended with {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
