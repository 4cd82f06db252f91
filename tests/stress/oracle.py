"""Test oracle: the reference result of each checkpoint and seed, made before the first fault.

The references come from the daemon under test itself. ``tests/end_to_end/test_parity.py`` shows that its results agree
with diffusers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from xditd.client import Client, GenerationJob, Loan

CHECKPOINTS = ("1", "2")
"""Names of transformers of one architecture, whose files have the same size."""
SEEDS = range(6)
STEPS = 4
PIXELS = 128
NOT_FINITE = "nan"
"""Name of checkpoint 1 with one weight that is NaN."""
VAE = "vae"


def write_checkpoints(folder: Path) -> None:
    """Write all files that clients lend."""
    from safetensors.torch import load_file

    from xditd.client.demo import checkpoints

    for name in CHECKPOINTS:
        checkpoints.write_flux1(checkpoint_path(folder, name), seed=int(name))
    checkpoints.write_flux_vae(checkpoint_path(folder, VAE), seed=3)
    with_nan = load_file(checkpoint_path(folder, CHECKPOINTS[0]))
    with_nan["img_in.bias"][0] = float("nan")
    checkpoints.save_aligned(with_nan, checkpoint_path(folder, NOT_FINITE))


def checkpoint_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def copy_checkpoint(folder: Path, name: str, copy: Path) -> None:
    """Make a writable copy. An existing file of that name is replaced, not overwritten, because it may be mapped."""
    fresh = copy.with_suffix(".new")
    shutil.copyfile(checkpoint_path(folder, name), fresh)
    fresh.replace(copy)


def conditioning_for(seed: int) -> dict[str, torch.Tensor]:
    """Return text embeddings (1, 16, 4096) and pooled ones (1, 768) of a seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, 16, 4096, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 768, generator=generator),
    }


def latents_for(seed: int) -> torch.Tensor:
    """Return noise (1, 16, h, w) for a single forward."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, PIXELS // 8, PIXELS // 8, generator=generator)


def start_job(
    client: Client, loan: Loan, seed: int, *, steps: int = STEPS, vae: Loan | None = None, deadline_s: float
) -> GenerationJob:

    return client.generate(
        loan,
        conditioning_for(seed),
        vae=vae,
        height=PIXELS,
        width=PIXELS,
        steps=steps,
        seed=seed,
        deadline_s=deadline_s,
    )


def digest(latents: torch.Tensor) -> str:
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()


class Oracle:
    """Compares results with the references in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._references: dict[str, str] = json.loads(references_path(folder).read_text())

    def is_right(self, checkpoint: str, seed: int, latents: torch.Tensor) -> bool:
        """Return whether latents equal, bit for bit, the reference of this checkpoint and seed."""
        return digest(latents) == self._references[f"{checkpoint}/{seed}"]


def make_references(client: Client, folder: Path, deadline_s: float) -> None:
    """Run every job once, before the first fault, and keep the digests in ``folder``.

    Raises:
        ValueError: two results are equal, so a mix-up of them would not be seen.
    """
    references = {}
    for name in CHECKPOINTS:
        with client.lend(checkpoint_path(folder, name), deadline_s=deadline_s) as loan:
            for seed in SEEDS:
                latents = start_job(client, loan, seed, deadline_s=deadline_s).result().latents
                references[f"{name}/{seed}"] = digest(latents)
    keep_references(references, folder)


def keep_references(references: dict[str, str], folder: Path) -> None:
    if len(set(references.values())) < len(references):
        raise ValueError(f"references: {len(references)} jobs gave {len(set(references.values()))} different results")
    references_path(folder).write_text(json.dumps(references))


def references_path(folder: Path) -> Path:
    return folder / "references.json"
