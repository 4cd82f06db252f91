"""Packed checkpoints, lent as files: the bits of diffusers' class on the weights that they mean."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
import z_image_models
from packed_checkpoints import FORMATS, Packed, pack

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.client.lending import describe
from xditd.gpu_workers.families.flux1 import reference

if TYPE_CHECKING:
    from one_rank import OneRank

    from xditd.gpu_workers.models.components import Component

SMALL = {"heads": 1, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 64}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZE = {"height": 32, "width": 48, "steps": 2}


def lend(rank: OneRank, name: str, source: Any, compute_dtype: str | None = None) -> Component:
    offer = describe(source, compute_dtype=compute_dtype)
    rank._offers.append(offer)
    rank.components.prepare(name, offer.manifest, rank.client)
    return rank.components.plug(name)


def flux1_given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(2, 5, 64, generator=generator),
        "pooled": torch.randn(2, 64, generator=generator),
        "noise": torch.randn(2, 16, 4, 6, generator=generator),
    }


def flux1_expected(meant: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> torch.Tensor:
    return reference.reference_latents(
        reference.transformer_from(meant),
        prompt_embeds=given["prompt_embeds"],
        pooled_prompt_embeds=given["pooled"],
        noise=given["noise"],
        **SIZE,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed_format", FORMATS)
def test_flux1_has_the_bits_of_diffusers(
    rank: OneRank, direct: ModuleType, tmp_path: Path, packed_format: str, dtype: str
) -> None:
    packed = pack(flux1_state_dict(0, **SMALL), packed_format, DTYPES[dtype])
    component = lend(rank, "a", packed.save(tmp_path / "x.safetensors"), dtype)
    assert component.model.dtype == DTYPES[dtype]
    given = flux1_given()
    latents = direct.generate(component.model, **given, **SIZE)
    assert latents.dtype == DTYPES[dtype]
    assert torch.equal(latents, flux1_expected(packed.meant, given))
