"""Videos through a real daemon and two ranks: frames that both decode, their progress, previews, files and a cancel."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wan_models
import wan_vaes
from safetensors.torch import save_file

from xditd.client import BadRequest, Cancelled, FramesDecoded, StepDone

SIDES = {"frames": 5, "height": 512, "width": 512}
"""The smallest that all ranks decode together."""
STEPS = {"steps": 1, "guidance_scale": 1.0, "seed": 7}
BAR = 6e-6
"""The largest difference of a million pixels in [-1, 1]. Of one frame, diffusers itself differs by 1.8e-6 from a run
with another number of threads."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("video")
    save_file(wan_models.state_dict(0, wan_models.TI2V), folder / "ti2v.safetensors")
    save_file(wan_vaes.state_dict(config=wan_vaes.SMALL_2_2), folder / "vae.safetensors")
    return SimpleNamespace(transformer=folder / "ti2v.safetensors", vae=folder / "vae.safetensors")


def texts() -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(2))}


def decoded(latents: torch.Tensor) -> torch.Tensor:
    module = wan_vaes.reference(wan_vaes.state_dict(config=wan_vaes.SMALL_2_2), wan_vaes.SMALL_2_2)
    return wan_vaes.reference_decode(module, wan_vaes.SMALL_2_2, latents)


@pytest.mark.slow
def test_ti2v_gives_frames_that_both_ranks_decode(client: Any, files: SimpleNamespace, tmp_path: Any) -> None:
    transformer, vae = client.lend(files.transformer), client.lend(files.vae)
    job = client.generate(transformer, texts(), vae=vae, previews="image", **SIDES, **STEPS)
    told: list[Any] = []
    for event in job.events():
        told.append(event)
        if isinstance(event, StepDone):
            preview = job.preview()
    frames = [(each.frames, each.total_frames) for each in told if isinstance(each, FramesDecoded)]
    assert frames == [(1, 5), (5, 5)]
    assert preview.shape == (1, 3, 512, 512)
    assert preview.std() > 0.01
    result = job.result()
    assert (result.latents.shape, result.image.shape) == ((1, 48, 2, 32, 32), (1, 3, 5, 512, 512))
    assert (result.image - decoded(result.latents)).abs().max() <= BAR
    assert len(list(result.save(tmp_path / "clip").iterdir())) == 5


def cancelled_at(client: Any, loans: Sequence[Any], frames: int) -> int | None:
    """Cancel a job once its first frames are told; return how many were told, or ``None`` if it ended before that."""
    transformer, vae = loans
    job = client.generate(transformer, texts(), vae=vae, frames=frames, height=128, width=128, **STEPS)
    told = 0
    try:
        for event in job.events():
            if isinstance(event, FramesDecoded):
                told = event.frames
                job.cancel()
    except Cancelled:
        return told
    return None


def test_a_cancel_takes_effect_between_frames(client: Any, files: SimpleNamespace) -> None:
    transformer, vae = client.lend(files.transformer), client.lend(files.vae)
    for frames in (129, 513, 1025):  # a busy machine may keep this process waiting until a short video is decoded
        told = cancelled_at(client, (transformer, vae), frames)
        if told is not None:
            break
    assert told is not None
    assert 1 <= told < frames
    small = {"frames": 5, "height": 32, "width": 64}
    result = client.generate(transformer, texts(), vae=vae, **small, **STEPS).result()
    with torch.no_grad():
        assert (result.image - decoded(result.latents)).abs().max() <= BAR


def test_what_cannot_be_is_refused_by_name(client: Any, files: SimpleNamespace) -> None:
    transformer, vae = client.lend(files.transformer), client.lend(files.vae)
    with pytest.raises(BadRequest, match="frames: 6 is not 1 more than a multiple of 4"):
        client.generate(transformer, texts(), vae=vae, **SIDES | {"frames": 6}, **STEPS)
    with pytest.raises(BadRequest, match=r"latents are \[1, 16, 3, 4, 4\]|latents: "):
        client.decode(vae, torch.zeros(1, 16, 3, 4, 4))
