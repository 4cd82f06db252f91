"""Jobs for the tests of a cluster, and what a lone client makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from xditd.client import Client
from xditd.client.cluster.content_hashes import ContentHashes
from xditd.client.cluster.messages import HERE, Job, StoredTensors, store
from xditd.client.demo import checkpoints

SIDE, STEPS = 128, 2


def write_models(folder: Path) -> tuple[Path, Path]:
    """Write a transformer and a VAE."""
    folder.mkdir(parents=True, exist_ok=True)
    transformer, vae = folder / "flux1.safetensors", folder / "ae.safetensors"
    checkpoints.write_flux1(transformer, seed=1)
    checkpoints.write_flux_vae(vae, seed=3)
    return transformer, vae


def conditioning(seed: int = 0, tokens: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, tokens, 4096, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 768, generator=generator),
    }


def make_job(hashes: ContentHashes, transformer: Path, vae: Path | None, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "versions": HERE,
        "job_id": "job-1",
        "transformer": hashes.of(transformer),
        "vae": None if vae is None else hashes.of(vae),
        "height": SIDE,
        "width": SIDE,
        "steps": STEPS,
        "sigmas": None,
        "guidance_scale": None,
        "seed": 5,
        "step_cache": 0.0,
        "variant": "class",
        "options": None,
        "compute_dtype": None,
        "deadline_s": None,
    }
    return Job(**(fields | changes))


def make_tensors() -> StoredTensors:
    return store(conditioning(0))


def bits(tensors: StoredTensors) -> str:
    """Digest the bytes of a result."""
    found = hashlib.sha256()
    for name, each in sorted(tensors.items()):
        assert not isinstance(each, list)
        found.update(name.encode() + each.data)
    return found.hexdigest()


def direct_bits(client: Client, transformer: Path, vae: Path | None, seeds: list[int]) -> Iterator[str]:
    """What a client of the daemon itself gets."""
    lent = client.lend(transformer)
    lent_vae = None if vae is None else client.lend(vae)
    for seed in seeds:
        result = client.generate(
            lent, conditioning(), vae=lent_vae, height=SIDE, width=SIDE, steps=STEPS, seed=seed
        ).result()
        found = {"latents": result.latents}
        if result.image is not None:
            found["image"] = result.image
        yield bits(store(found))
