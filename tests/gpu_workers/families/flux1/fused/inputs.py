"""Job inputs for the programs of this folder, the same in every process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[3] / "support"))  # where programs find direct_jobs
sys.path.append(str(Path(__file__).parents[4] / "checkpoints"))

GUIDANCE = 3.5


def job(tokens: int, height: int, width: int, batch: int) -> dict[str, Any]:
    """Conditioning and noise of a case, and its size."""
    generator = torch.Generator().manual_seed(tokens)
    return {
        "prompt_embeds": torch.randn(batch, tokens, 4096, generator=generator),
        "pooled": torch.randn(batch, 768, generator=generator),
        "noise": torch.randn(batch, 16, height // 8, width // 8, generator=generator),
        "height": height,
        "width": width,
    }


def reference_latents(model: Any, given: dict[str, Any], steps: int) -> torch.Tensor:
    """What plain diffusers makes of the same job."""
    from xditd.gpu_workers.families.flux1 import reference

    renamed = {"pooled_prompt_embeds" if name == "pooled" else name: value for name, value in given.items()}
    return reference.reference_latents(model, **renamed, steps=steps, guidance_scale=GUIDANCE)
