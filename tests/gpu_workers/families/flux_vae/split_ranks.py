"""A program, not a test: decode with FLUX.1's VAE or FLUX.2's on several ranks, and on rank 0 alone, and write both.

    python split_ranks.py OUT_FOLDER RANKS cpu|cuda

Every rank writes ``rank<N>.safetensors`` with ``<case>/<round>``; rank 0 adds ``<case>/whole`` and, in float32 whatever
the weights are, ``<case>/float32``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROUNDS = 2

# batch, latent height and width, dtype of the weights
CASES = {
    "rows divide by two and three": (1, 6, 4, torch.float32),
    "a row left over": (1, 7, 5, torch.float32),
    "a row for each": (1, 3, 6, torch.float32),
    "batch of two": (2, 5, 3, torch.float32),
    "no attention": (1, 5, 4, torch.float32),
    "bfloat16": (1, 5, 3, torch.bfloat16),
    "FLUX.2": (1, 3, 4, torch.float32),
    "FLUX.2, narrow decoder, batch of two": (2, 5, 3, torch.float32),
}
GPU_CASES = {
    "a row left over": (1, 65, 72, torch.float32),
    "batch of two": (2, 64, 64, torch.float32),
    "bfloat16": (1, 128, 96, torch.bfloat16),
    "FLUX.2": (1, 33, 40, torch.float32),
}


def run_rank(rank: int, ranks: int, folder: str, kind: str) -> None:
    from safetensors.torch import save_file

    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.process import xfuser_start

    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    layout = xfuser_start.start(rank, ranks, f"{folder}/store", device)
    import flux2_vaes
    from direct_jobs import decode, plugged

    cache = ModelCache(layout)

    def decoder(dtype: torch.dtype, values: torch.dtype, case: str):
        """The same weights in one dtype, with values that another one can hold."""
        if case.startswith("FLUX.2"):
            config = flux2_vaes.NARROW if "narrow" in case else flux2_vaes.SMALL
            state = flux2_vaes.state_dict(0, config, naming="diffusers" if "batch" in case else "comfyui")
            state = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        else:
            state = checkpoints.flux_vae_state_dict(0, channels=(64, 64, 64, 128), encoder=False)
        state = {name: tensor.to(values).to(device, dtype) for name, tensor in state.items()}
        if case == "no attention":
            state = {name: tensor for name, tensor in state.items() if ".attn_1." not in name}
        return plugged(cache, state)

    results: dict[str, torch.Tensor] = {}
    for case, (batch, height, width, dtype) in (CASES if kind == "cpu" else GPU_CASES).items():
        model = decoder(dtype, dtype, case)
        generator = torch.Generator().manual_seed(height)
        channels = 128 if case.startswith("FLUX.2") else 16
        latents = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
        for attempt in range(ROUNDS):
            results[f"{case}/{attempt}"] = decode(model, latents, is_shared=True)
        if rank == 0:
            results[f"{case}/whole"] = decode(model, latents)
            exact = decoder(torch.float32, dtype, case)
            results[f"{case}/float32"] = decode(exact, latents.float())
    save_file({name: tensor.cpu().contiguous() for name, tensor in results.items()}, f"{folder}/rank{rank}.safetensors")
    xfuser_start.stop()


def main(folder: str, ranks: int, kind: str) -> None:
    tests = Path(__file__).parents[3]
    sys.path += [str(tests / "gpu_workers" / "support"), str(tests / "checkpoints")]
    if kind == "cpu":
        from forked_ranks import fork_ranks

        fork_ranks(run_rank, ranks, ranks, folder, kind)
    else:
        torch.multiprocessing.spawn(run_rank, (ranks, folder, kind), nprocs=ranks)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
