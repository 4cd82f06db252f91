"""Wan's adapter converts ComfyUI's arguments to those of diffusers' class, and results back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xditd.client import BadRequest
from xditd.client.comfyui.families.wan import WanModel
from xditd.client.comfyui.step_inputs import StepInputs
from xditd.client.jobs.arguments import KeptTensor

TEXT = WanModel()
CLIP_IMAGE = WanModel(has_image=True)
TI2V = WanModel(has_frame_times=True)


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments_of(model: WanModel, *given: Any, dtype: torch.dtype = torch.bfloat16, **more: Any) -> dict[str, Any]:
    call = model.read(*given, **more)
    assert not call.faults
    numbers, kept = StepInputs().read(
        call.rows, call.numbers, call.texts, lambda texts: model.keep_row(texts, KeptTensor, dtype)
    )
    (found,) = call.arguments(slice(0, call.rows), numbers, kept, KeptTensor, dtype)
    return found


def test_arguments_are_as_the_class_takes_them():
    x, time, context = drawn(2, 16, 3, 4, 6), torch.tensor([712.5, 300.0]), drawn(2, 5, 32)
    found = arguments_of(TEXT, x, time, context, transformer_options={}, control=None)
    assert next(iter(found)) == "hidden_states"  # results come where the first tensor is
    assert torch.equal(found["hidden_states"], x.bfloat16())
    assert found["timestep"].dtype is torch.float32
    assert torch.equal(found["timestep"], time)
    assert sorted(found) == ["encoder_hidden_states", "hidden_states", "timestep"]


def test_each_frame_may_have_its_own_time():
    x, times, context = drawn(2, 48, 3, 4, 6), torch.tensor([[0.0, 700.0, 700.0], [0.0, 300.0, 300.0]]), drawn(2, 5, 32)
    found = arguments_of(TI2V, x, times, context, denoise_mask=torch.ones(2, 48, 3, 4, 6))
    assert torch.equal(found["timestep"], times.repeat_interleave(6, dim=1))
    assert arguments_of(TI2V, x, torch.tensor([700.0]), context)["timestep"].tolist() == [700.0, 700.0]
    call = TI2V.read(x, times, context)
    numbers, kept = StepInputs().read(
        2, call.numbers, call.texts, lambda texts: TI2V.keep_row(texts, KeptTensor, x.dtype)
    )
    (second,) = call.arguments(slice(1, 2), numbers, kept[1:], KeptTensor, x.dtype)
    assert torch.equal(second["timestep"], times[1:].repeat_interleave(6, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prediction_has_the_shape_and_dtype_of_comfyuis_latents(dtype):
    x = drawn(2, 16, 3, 3, 6).to(dtype)
    call = TEXT.read(x, torch.tensor([500.0]), drawn(2, 5, 32))
    found = call.prediction(slice(0, 2), [(torch.nn.functional.pad(x.float(), (0, 0, 0, 1)),)])
    assert found.dtype is dtype
    assert torch.equal(found, x)


def test_what_cannot_run_is_named():
    x, time, context = drawn(1, 16, 3, 4, 4), torch.ones(1), drawn(1, 512, 32)
    seen = drawn(1, 257, 1280)
    for model, more, says in (
        (TEXT, {"control": object()}, "control of the conditioning"),
        (TEXT, {"reference_latent": x}, "reference_latent of the conditioning"),
        (TEXT, {"time_dim_concat": x}, "latents behind those of the video (time_dim_concat)"),
        (TEXT, {"timestep": torch.ones(1, 3)}, "a time for each frame"),
        (TEXT, {"denoise_mask": x}, "denoise_mask of the conditioning"),
        (TI2V, {"timestep": torch.ones(1, 5)}, "a time for each frame"),
        (TEXT, {"clip_fea": seen}, "the output of a CLIP vision model, which this model does not read"),
        (TEXT, {"transformer_options": {"rope_options": {"scale_t": 2}}}, "scaled or shifted positions (rope_options)"),
        (CLIP_IMAGE, {}, "no output of a CLIP vision model, which this model reads"),
        (CLIP_IMAGE, {"clip_fea": seen[:, :50]}, "50 tokens of a CLIP vision model, not the 257 of one image"),
        (CLIP_IMAGE, {"clip_fea": seen, "context": context[:, :9]}, "a text of 9 tokens, not 512, beside an image"),
    ):
        assert model.read(**{"x": x, "timestep": time, "context": context, **more}).faults == [says]
    with pytest.raises(BadRequest, match="no text embeddings; connect CLIP Text Encode"):
        TEXT.read(x, time, None)
    assert list(TEXT.condition_faults({"reference_latents": [x]})) == ["reference latents"]
    assert not list(TEXT.condition_faults({"concat_latent_image": x, "concat_mask": x}))
