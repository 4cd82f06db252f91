"""Wan's adapter converts ComfyUI's arguments to those of diffusers' class, and results back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_calls import arguments_of, drawn

from xditd.client import BadRequest
from xditd.client.comfyui.families.wan_calls import WanModel
from xditd.client.comfyui.families.wan_relatives import RELATIVES, name_relative
from xditd.client.comfyui.families.wan_vace import VaceModel
from xditd.client.comfyui.step_inputs import StepInputs
from xditd.client.jobs.arguments import KeptTensor, RowsOf

TEXT = WanModel()
CLIP_IMAGE = WanModel(has_image=True)
TWO_IMAGES = WanModel(has_image=True, has_positions=True)
VACE = VaceModel(control_blocks=3)
TI2V = WanModel(has_frame_times=True)


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


def tensors_of(given: Any) -> torch.Tensor:
    """Return what the workers read of kept rows."""
    if isinstance(given, KeptTensor):
        return given.tensor
    return torch.cat([each.tensor.repeat_interleave(times, dim=0) for each, times in given.parts])


def test_a_model_of_two_images_gets_one_after_another_or_the_first_alone():
    x, time, context = drawn(2, 36, 3, 4, 6), torch.tensor([712.5]), drawn(2, 512, 32)
    both = drawn(1, 514, 1280)  # the same of both rows
    found = arguments_of(TWO_IMAGES, x, time, context, both, dtype=torch.float32)["encoder_hidden_states_image"]
    assert torch.equal(tensors_of(found), both.reshape(2, 257, 1280).repeat(2, 1, 1))
    of_rows = drawn(2, 514, 1280)
    found = arguments_of(TWO_IMAGES, x, time, context, of_rows, dtype=torch.float32)["encoder_hidden_states_image"]
    assert torch.equal(tensors_of(found), of_rows.reshape(4, 257, 1280))
    for model, seen in ((TWO_IMAGES, drawn(2, 257, 1280)), (CLIP_IMAGE, of_rows)):
        found = arguments_of(model, x, time, context, seen, dtype=torch.float32)["encoder_hidden_states_image"]
        assert torch.equal(tensors_of(found), seen)


def test_what_a_clip_vision_model_saw_is_dropped_as_comfyui_drops_it():
    found = arguments_of(TEXT, drawn(1, 16, 3, 4, 4), torch.ones(1), drawn(1, 9, 32), drawn(1, 257, 1280))
    assert sorted(found) == ["encoder_hidden_states", "hidden_states", "timestep"]


def test_controls_of_vace_are_kept_by_row_and_their_strengths_are_numbers():
    x, time, context = drawn(2, 16, 3, 6, 8), torch.tensor([712.5, 300.0]), drawn(2, 5, 32)
    controls = drawn(2, 2, 96, 3, 6, 8)
    found = arguments_of(VACE, x, time, context, vace_context=controls, vace_strength=[0.7, 0.0])
    assert next(iter(found)) == "hidden_states"
    assert torch.equal(tensors_of(found["control_hidden_states"]), controls.bfloat16().flatten(0, 1))
    scales = found["control_hidden_states_scale"]
    assert scales.dtype is torch.float32
    assert torch.equal(scales, torch.tensor([[0.7] * 3, [0.0] * 3]))
    one = arguments_of(VACE, x, time, context, vace_context=controls[:1, :1], vace_strength=[1.0, 0.5])
    assert isinstance(one["control_hidden_states"], RowsOf)
    assert torch.equal(tensors_of(one["control_hidden_states"]), controls[:1, 0].bfloat16().repeat(2, 1, 1, 1, 1))
    assert one["control_hidden_states_scale"].shape == (1, 3)


def test_controls_of_vace_that_cannot_run_are_named():
    x, time, context = drawn(1, 16, 3, 4, 4), torch.ones(1), drawn(1, 5, 32)
    control = drawn(1, 2, 96, 3, 4, 4)
    for more, says in (
        ({}, "no control, which VACE reads (vace_context)"),
        (
            {"vace_context": control[:, :, :, :2]},
            "a control of 2 x 4 x 4 latents for a video of 3 x 4 x 4 (frames, rows",
        ),
        ({"vace_context": control, "vace_strength": [1.0]}, "1 strengths for 2 controls (vace_strength)"),
        ({"vace_context": control, "time_dim_concat": x}, "latents behind those of the video (time_dim_concat)"),
    ):
        (fault,) = VACE.read(x, time, context, **{"vace_strength": [1.0, 1.0], **more}).faults
        assert fault.startswith(says)


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
        (TEXT, {"transformer_options": {"rope_options": {"scale_t": 2}}}, "scaled or shifted positions (rope_options)"),
        (CLIP_IMAGE, {}, "no output of a CLIP vision model, which this model reads"),
        (
            CLIP_IMAGE,
            {"clip_fea": seen[:, :50]},
            "50 tokens of a CLIP vision model, not the 257 of one image or the 514 of two",
        ),
        (CLIP_IMAGE, {"clip_fea": seen, "context": context[:, :9]}, "a text of 9 tokens, not 512, beside an image"),
    ):
        assert model.read(**{"x": x, "timestep": time, "context": context, **more}).faults == [says]
    with pytest.raises(BadRequest, match="no text embeddings; connect CLIP Text Encode"):
        TEXT.read(x, time, None)
    assert list(TEXT.condition_faults({"reference_latents": [x]})) == ["reference latents"]
    assert not list(TEXT.condition_faults({"concat_latent_image": x, "concat_mask": x}))


PLAIN = {"in_dim": 16, "out_dim": 16, "dim": 256, "num_heads": 2, "eps": 1e-6, "patch_size": [1, 2, 2]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"in_dim_ref_conv": 16}, "it reads a reference image (Wan Fun)"),
        ({"in_dim": 52}, "it has 52 channels, to 16 (Wan 2.2 Fun Control)"),
        ({"in_dim": 148, "out_dim": 48}, "it has 148 channels, to 48 (Wan 2.2 Fun Control 5B)"),
        ({"in_dim": 17}, "it has 17 channels, to 16"),
        ({"flf_pos_embed_token_number": 771}, "it has positions of 771 tokens of images, not of 514"),
        ({"vace_in_dim": 80}, "it has controls of 80 channels for 16, not of 96 for 16"),
        ({"vace_in_dim": 96, "in_dim": 36}, "it has controls of 96 channels for 36, not of 96 for 16"),
        ({"eps": 1e-5}, "its header sets eps to 1e-05, not 1e-06"),
        ({"num_heads": 4}, "its header sets num_heads to 4, not 2"),
        ({"qk_norm": False}, "its header sets qk_norm to False, not True"),
    ],
    ids=str,
)
def test_relatives_with_the_configuration_of_wan_are_named(changes, says):
    assert name_relative("WAN21_T2V", {**PLAIN, **changes}) == says


def test_relatives_are_named_by_their_configuration():
    assert name_relative("WAN21_T2V", PLAIN) is None
    assert name_relative("WAN21_Vace", {**PLAIN, "vace_in_dim": 96}) is None
    for kind, name in RELATIVES.items():
        assert name_relative(kind, PLAIN) == f"it is {name} ({kind})"
