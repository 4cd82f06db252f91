"""Qwen-Image's adapter converts ComfyUI's arguments to those of diffusers' class, and results back."""

from __future__ import annotations

import pytest
import torch
from adapter_calls import arguments_of, drawn

from xditd.client import BadRequest
from xditd.client.comfyui.families.qwen_image import QwenImageModel
from xditd.client.jobs.arguments import RowsOf

MODEL = QwenImageModel("index")


def test_arguments_are_as_the_class_takes_them():
    from diffusers import QwenImagePipeline

    x, sigma, context = drawn(2, 16, 1, 4, 6), torch.tensor([0.7, 0.3]), drawn(2, 5, 32)
    reference = drawn(2, 16, 1, 2, 8, seed=2)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    found = arguments_of(MODEL, x, sigma, context, mask, [reference], transformer_options={})
    assert next(iter(found)) == "hidden_states"  # results come where the first tensor is
    right = [QwenImagePipeline._pack_latents(each, 2, 16, *each.shape[3:]) for each in (x, reference)]
    assert torch.equal(found["hidden_states"], torch.cat(right, dim=1).bfloat16())
    assert found["img_shapes"] == [[(1, 2, 3), (1, 1, 4)]] * 2
    assert found["timestep"].dtype is torch.float32
    assert torch.equal(found["timestep"], sigma)
    assert isinstance(found["encoder_hidden_states"], RowsOf)
    kept = found["encoder_hidden_states_mask"]
    assert all(row.tensor.tolist() == [[True, True, True, False, False]] for row, _ in kept.parts)


def test_a_call_without_a_mask_has_none():
    assert "encoder_hidden_states_mask" not in arguments_of(
        MODEL, drawn(1, 16, 1, 4, 4), torch.ones(1), drawn(1, 5, 32)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prediction_has_the_shape_and_dtype_of_comfyuis_latents(dtype):
    from diffusers import QwenImagePipeline

    x = drawn(2, 16, 1, 3, 6).to(dtype)
    call = MODEL.read(x, torch.tensor([0.5]), drawn(2, 5, 32), ref_latents=[x])
    wider = torch.nn.functional.pad(x.float(), (0, 0, 0, 1))
    tokens = QwenImagePipeline._pack_latents(wider, 2, 16, 4, 6)
    found = call.prediction(slice(0, 2), [(torch.cat([tokens, tokens], dim=1),)])
    assert found.dtype is dtype
    assert torch.equal(found, x)


def test_what_cannot_run_is_named():
    x, sigma, context = drawn(1, 16, 1, 4, 4), torch.ones(1), drawn(1, 5, 32)
    for more, says in (
        ({"control": object()}, "ControlNet"),
        ({"additional_t_cond": torch.zeros(1)}, "conditioning of time (Qwen-Image-Layered)"),
        ({"attention_mask": torch.ones(1, 5)}, "an attention mask of weights"),
        (
            {"ref_latents": [x], "ref_latents_method": "offset"},
            "reference latents by the method 'offset' (this model's is 'index')",
        ),
    ):
        assert MODEL.read(x, sigma, context, **more).faults == [says]
    assert MODEL.read(drawn(1, 16, 2, 4, 4), sigma, context).faults == ["latents of several frames"]
    assert not MODEL.read(x, sigma, context, ref_latents=[x], ref_latents_method="index").faults
    assert list(MODEL.condition_faults({"reference_latents": [x], "reference_latents_method": "uxo"}))
    with pytest.raises(BadRequest, match="no text embeddings"):
        MODEL.read(x, sigma, None)
