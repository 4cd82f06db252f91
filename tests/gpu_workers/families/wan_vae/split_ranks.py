"""A program, not a test: decode and encode on several ranks together, and on rank 0 alone, and write both.

    python split_ranks.py OUT_FOLDER RANKS cpu|cuda

Every rank writes ``rank<N>.safetensors`` with ``<case>/<way>/<round>``, ``way`` decode or encode; rank 0 adds
``<case>/<way>/whole``, and ``<case>/<way>/exact``, by diffusers in float64, of which images are clamped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROUNDS = 2

# VAE, batch, frames (0: an image), height and width in latents, dtype of the weights
CASES = {
    "image": ("wan 2.1", 1, 0, 5, 3, torch.float32),
    "a row left over": ("wan 2.1", 1, 3, 7, 4, torch.float32),
    "a row for each": ("wan 2.1", 2, 2, 3, 2, torch.float32),
    "TI2V": ("wan 2.2", 1, 2, 5, 3, torch.float32),
    "bfloat16": ("wan 2.1", 1, 2, 4, 3, torch.bfloat16),
}
GPU_CASES = {
    "image": ("wan 2.1", 1, 0, 65, 72, torch.float32),
    "video": ("wan 2.1", 1, 3, 31, 52, torch.float32),
    "TI2V": ("wan 2.2", 1, 3, 23, 40, torch.float32),
    "bfloat16": ("wan 2.1", 1, 3, 45, 80, torch.bfloat16),
}


def run_rank(rank: int, ranks: int, folder: str, kind: str) -> None:
    from safetensors.torch import save_file

    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.process import xfuser_start

    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    layout = xfuser_start.start(rank, ranks, f"{folder}/store", device)
    import wan_vaes
    from direct_jobs import decode, encode, plugged

    cache = ModelCache(layout)
    results: dict[str, torch.Tensor] = {}
    for case, (vae, batch, frames, height, width, dtype) in (CASES if kind == "cpu" else GPU_CASES).items():
        state = wan_vaes.state_dict("original", wan_vaes.CONFIGS[vae])
        model = plugged(cache, {name: tensor.to(device, dtype) for name, tensor in state.items()})
        channels, pixels = model.config.release.channels, model.config.release.pixels
        generator = torch.Generator().manual_seed(height)
        plain = wan_vaes.reference({name: each.to(dtype) for name, each in state.items()}, model.config)
        plain = plain.to(device, torch.float64)
        latents = torch.randn(batch, channels, *([frames] if frames else []), height, width, generator=generator)
        shape = (batch, 3, *([4 * frames - 3] if frames else []), height * pixels, width * pixels)
        pictures = torch.rand(shape, generator=generator) * 2 - 1
        for way, run, given in (("decode", decode, latents), ("encode", encode, pictures)):
            for attempt in range(ROUNDS):
                results[f"{case}/{way}/{attempt}"] = run(model, given.to(dtype), is_shared=True)
            if rank == 0:
                results[f"{case}/{way}/whole"] = run(model, given.to(dtype))
                wide = given.to(device, dtype).double()
                wide = wide if frames else wide.unsqueeze(2)
                if way == "decode":
                    found = wan_vaes.reference_decode(plain, model.config, wide)
                else:
                    found = wan_vaes.reference_encode(plain, model.config, wide, is_image=not frames)
                results[f"{case}/{way}/exact"] = found if frames else found[:, :, 0]
    save_file({name: tensor.cpu().contiguous() for name, tensor in results.items()}, f"{folder}/rank{rank}.safetensors")
    xfuser_start.stop()


def main(folder: str, ranks: int, kind: str) -> None:
    sys.path += [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3] / "checkpoints")]
    if kind == "cpu":
        from forked_ranks import fork_ranks

        fork_ranks(run_rank, ranks, ranks, folder, kind)
    else:
        torch.multiprocessing.spawn(run_rank, (ranks, folder, kind), nprocs=ranks)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
