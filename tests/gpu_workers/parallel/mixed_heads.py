"""A program, not a test: models of different numbers of attention heads, in turns, in one group of gloo ranks each.

    python mixed_heads.py OUT_FOLDER LAYOUT...

Each rank of each group writes ``<layout>/rank<N>.safetensors`` with ``<heads>/<case>/<round>`` tensors, and
``rank<N>.json`` with what it has made for them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

SEED = 0
ROUNDS = 2
MODEL = {"double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 32}

GROUPS: dict[str, dict[int, dict[str, int]]] = {
    "ulysses=2": {
        2: {"ulysses": 2, "ring": 1, "cfg": 1},
        1: {"ulysses": 1, "ring": 2, "cfg": 1},
        3: {"ulysses": 1, "ring": 2, "cfg": 1},
    },
    "ulysses=4": {
        6: {"ulysses": 2, "ring": 2, "cfg": 1},
        4: {"ulysses": 4, "ring": 1, "cfg": 1},
        3: {"ulysses": 1, "ring": 4, "cfg": 1},
    },
    "ulysses=2,ring=2": {
        4: {"ulysses": 2, "ring": 2, "cfg": 1},
        3: {"ulysses": 1, "ring": 4, "cfg": 1},
    },
    "ulysses=2,cfg=2": {
        1: {"ulysses": 1, "ring": 2, "cfg": 2},
        4: {"ulysses": 2, "ring": 1, "cfg": 2},
    },
}
"""The layout that each group was started with, and the models that are lent to it: heads, and the degrees they get."""

# name: text tokens, latent height, latent width, rows
CASES = {
    "all divide": (16, 16, 16, 1),
    "odd total, two rows": (13, 10, 12, 2),
}


def inputs(tokens: int, height: int, width: int, rows: int) -> dict[str, torch.Tensor]:
    """The tensors of a case, the same in every process; each row has a sigma and a guidance of its own."""
    generator = torch.Generator().manual_seed(tokens * 10_000 + height + width + rows)
    return {
        "prompt_embeds": torch.randn(rows, tokens, MODEL["context_dim"], generator=generator),
        "pooled": torch.randn(rows, MODEL["pooled_dim"], generator=generator),
        "latents": torch.randn(rows, 16, height, width, generator=generator),
        "timestep": torch.linspace(0.7, 0.4, rows),
        "guidance": torch.linspace(3.5, 1.0, rows),
    }


def run_rank(rank: int, layout: str, states: dict[int, dict[str, torch.Tensor]], folder: Path) -> None:
    import psutil
    from safetensors.torch import save_file
    from torch.distributed import distributed_c10d

    from xditd.gpu_workers.models.cached_model import CachedModel
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.degrees import Degrees, parse_layout

    torch.set_num_threads(1)
    degrees = Degrees(**parse_layout(layout))
    started = xfuser_start.start(rank, degrees.world_size, str(folder / "store"), torch.device("cpu"), degrees)

    from direct_jobs import denoise, plugged

    def lend(cache: ModelCache) -> dict[int, CachedModel]:
        return {heads: plugged(cache, state) for heads, state in states.items()}

    groups = distributed_c10d._world.pg_map
    facts: dict[str, Any] = {"groups at start": len(groups)}
    models = lend(ModelCache(started))
    facts["groups"] = len(groups)
    results = {}
    for attempt in range(ROUNDS):
        for case, sizes in CASES.items():
            for heads, model in models.items():  # each forward follows one of another shape
                results[f"{heads}/{case}/{attempt}"] = denoise(model, **inputs(*sizes))
    before = psutil.Process().num_fds()
    lend(ModelCache(started))
    facts |= {
        "groups after lending all again": len(groups),
        "new descriptors": psutil.Process().num_fds() - before,
        "timeouts": sorted({str(group._get_backend(torch.device("cpu")).options._timeout) for group in groups}),
        "degrees": {heads: model.layout.degrees.named() for heads, model in models.items()},
        "attention": {heads: model.attention_backend for heads, model in models.items()},
    }
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"rank{rank}.safetensors")
    Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
    xfuser_start.stop()


def main(out: Path, *layouts: str) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    from forked_ranks import fork_ranks

    from xditd.client.demo import checkpoints
    from xditd.ipc.degrees import Degrees, parse_layout

    for layout in layouts:
        states = {heads: checkpoints.flux1_state_dict(SEED, heads=heads, **MODEL) for heads in GROUPS[layout]}
        folder = out / layout
        folder.mkdir()
        fork_ranks(run_rank, Degrees(**parse_layout(layout)).world_size, layout, states, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
