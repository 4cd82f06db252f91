"""Z-Image's adapter converts ComfyUI's arguments to those of diffusers' class, and results back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from adapter_calls import arguments_of, drawn

from xditd.client import BadRequest
from xditd.client.comfyui.families.z_image import ZImageModel

MODEL = ZImageModel()


def test_arguments_are_as_the_class_takes_them():
    x, sigma, context = drawn(2, 16, 4, 6), torch.tensor([0.7, 0.3]), drawn(2, 5, 32)
    found = arguments_of(MODEL, x, sigma, context, 5, torch.ones(2, 5), transformer_options={})
    assert next(iter(found)) == "x"  # results come where the first tensor is
    assert [tuple(row.shape) for row in found["x"]] == [(16, 1, 4, 6)] * 2
    assert torch.equal(torch.stack(found["x"]).squeeze(2), x.to(torch.bfloat16))
    assert found["t"].dtype is torch.float32
    assert torch.equal(found["t"], 1.0 - sigma)
    assert [tuple(kept.tensor.shape) for kept in found["cap_feats"]] == [(5, 32)] * 2
    assert torch.equal(torch.stack([kept.tensor for kept in found["cap_feats"]]), context.to(torch.bfloat16))


def test_equal_rows_share_what_is_kept():
    found = arguments_of(MODEL, drawn(3, 16, 4, 4), torch.full((3,), 0.5), drawn(1, 5, 32).repeat(3, 1, 1))
    first, second, third = found["cap_feats"]
    assert first is second is third


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prediction_is_negated_and_has_the_shape_and_dtype_of_comfyuis_latents(dtype):
    x = drawn(2, 16, 3, 6).to(dtype)
    call = MODEL.read(x, torch.tensor([0.5]), drawn(2, 5, 32))
    wider = torch.nn.functional.pad(x, (0, 0, 0, 1)).float()
    found = call.prediction(slice(0, 2), [(list(wider.unsqueeze(2)),)])
    assert found.dtype is dtype
    assert torch.equal(found, -x)


def test_the_loop_takes_a_text_for_each_row_and_no_guidance():
    texts = drawn(2, 5, 32)
    conditioning, scale = MODEL.loop_inputs({"c_crossattn": SimpleNamespace(cond=texts)}, 3)
    assert scale == 0.0
    assert torch.equal(torch.stack(conditioning["prompt_embeds"]), texts[[0, 1, 0]])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"control": {"input": []}}, "ControlNet"),
        ({"ref_latents": [drawn(1, 16, 4, 4)]}, "reference latents"),
        ({"ref_contexts": [drawn(1, 5, 32)]}, "texts of reference latents"),
    ],
)
def test_what_cannot_be_run_is_named(more, said):
    (fault,) = MODEL.read(drawn(1, 16, 4, 4), torch.tensor([0.5]), drawn(1, 5, 32), **more).faults
    assert said in fault


def test_conditioning_that_cannot_be_run_is_named():
    assert list(MODEL.condition_faults({"reference_latents": [], "cross_attn": drawn(1, 5, 32)})) == []
    (fault,) = MODEL.condition_faults({"reference_latents": [drawn(1, 16, 4, 4)]})
    assert "Omni" in fault


def test_a_call_without_text_is_refused():
    with pytest.raises(BadRequest, match="CLIP Text Encode"):
        MODEL.read(drawn(1, 16, 4, 4), torch.tensor([0.5]), None)
