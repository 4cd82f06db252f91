"""FLUX.2's adapter converts ComfyUI's arguments to those of diffusers' class, and results back."""

from __future__ import annotations

from types import SimpleNamespace

import flux2_models
import pytest
import torch
from adapter_calls import arguments_of, drawn

from xditd.client import BadRequest
from xditd.client.comfyui.families.base import KNOWN_SIZES
from xditd.client.comfyui.families.flux2 import Flux2Model
from xditd.client.jobs.arguments import KeptTensor, RowsOf

SIGMA = torch.tensor([0.7])


def test_arguments_are_as_the_class_takes_them():
    x, context = drawn(2, 128, 4, 6), drawn(2, 5, 32)
    found = arguments_of(Flux2Model(True), x, torch.tensor([0.7, 0.3]), context, None, torch.tensor([3.5]))
    assert next(iter(found)) == "hidden_states"  # results come where the first tensor is
    assert torch.equal(found["hidden_states"].transpose(1, 2).unflatten(2, (4, 6)), x.to(torch.bfloat16))
    assert torch.equal(found["timestep"], torch.tensor([0.7, 0.3]))
    assert torch.equal(found["guidance"], torch.tensor([3.5, 3.5]))
    ids = flux2_models.ids((4, 6), 5)
    assert torch.equal(found["img_ids"].tensor, ids["img_ids"])
    assert torch.equal(found["txt_ids"].tensor, ids["txt_ids"])
    assert isinstance(found["encoder_hidden_states"], RowsOf)
    rows = [kept.tensor for kept, _ in found["encoder_hidden_states"].parts]
    assert torch.equal(torch.cat(rows), context.to(torch.bfloat16))


def test_references_are_tokens_after_the_image_with_coordinates_of_their_own():
    x, references = drawn(2, 128, 3, 4), [drawn(2, 128, 2, 5), drawn(2, 128, 4, 4)]
    found = arguments_of(Flux2Model(False), x, SIGMA, drawn(2, 5, 32), ref_latents=references, dtype=torch.float32)
    assert torch.equal(found["img_ids"].tensor, flux2_models.ids((3, 4), 5, [(2, 5), (4, 4)])["img_ids"])
    for tokens, image in zip(found["hidden_states"].split([12, 10, 16], dim=1), [x, *references], strict=True):
        assert torch.equal(tokens.transpose(1, 2), image.flatten(2))


@pytest.mark.parametrize(
    ("method", "places"),
    [
        ("index", [(10, 0, 0), (20, 0, 0)]),
        ("offset", [(1, 0, 0), (1, 2, 0)]),
        ("uxo", [(0, 3, 4), (0, 5, 9)]),
    ],
)
def test_methods_place_references_where_comfyui_does(method, places):
    x, references = drawn(1, 128, 3, 4), [drawn(1, 128, 2, 5), drawn(1, 128, 4, 4)]
    more = {"ref_latents": references, "ref_latents_method": method}
    found = arguments_of(Flux2Model(False), x, SIGMA, drawn(1, 5, 32), **more)["img_ids"].tensor
    first, second = found[12:22], found[22:]
    assert [tuple(ids[0, :3].int().tolist()) for ids in (first, second)] == places
    assert torch.equal(first[-1, 1:3] - first[0, 1:3], torch.tensor([1.0, 4.0]))
    assert "ref_latents_method" not in Flux2Model.loop_conds  # Generate has one way


def test_klein_is_given_no_guidance():
    assert "guidance" not in arguments_of(
        Flux2Model(False), drawn(1, 128, 2, 2), SIGMA, drawn(1, 5, 32), guidance=torch.tensor([3.5])
    )


def test_positions_are_kept_for_a_few_sizes():
    model = Flux2Model(False)
    kept = [model.ids(KeptTensor, (2, columns)) for columns in (3, 3, *range(4, 4 + KNOWN_SIZES), 3)]
    assert kept[0] is kept[1]
    assert kept[-1] is not kept[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prediction_has_the_shape_and_dtype_of_comfyuis_latents(dtype):
    x = drawn(2, 128, 3, 6).to(dtype)
    call = Flux2Model(True).read(x, SIGMA, drawn(2, 5, 32), ref_latents=[drawn(2, 128, 2, 2)])
    tokens = torch.cat([x.flatten(2).transpose(1, 2).float(), drawn(2, 4, 128)], dim=1)
    found = call.prediction(slice(0, 2), [(tokens,)])
    assert found.dtype is dtype
    assert torch.equal(found, x)


def test_the_loop_takes_text_guidance_and_references():
    texts, reference = drawn(1, 5, 32), drawn(1, 128, 2, 3)
    conditions = {
        "c_crossattn": SimpleNamespace(cond=texts),
        "guidance": SimpleNamespace(cond=torch.tensor([2.5])),
        "ref_latents": SimpleNamespace(cond=[reference]),
    }
    conditioning, scale = Flux2Model(True).loop_inputs(conditions, 3)
    assert scale == 2.5
    assert conditioning["prompt_embeds"] is texts
    assert torch.equal(conditioning["reference_latents"][0], reference[0])
    assert Flux2Model(False).loop_inputs(conditions, 3)[1] == 1.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"control": {"input": []}}, "ControlNet"),
        ({"attention_mask": torch.ones(1, 5)}, "an attention mask"),
        (
            {"ref_latents": [drawn(1, 128, 4, 4)], "ref_latents_method": "index_timestep_zero"},
            "reference latents by the method 'index_timestep_zero' (use one of offset, index, uxo)",
        ),
    ],
)
def test_what_cannot_be_run_is_named(more, said):
    (fault,) = Flux2Model(True).read(drawn(1, 128, 4, 4), SIGMA, drawn(1, 5, 32), **more).faults
    assert said in fault


def test_conditioning_that_cannot_be_run_is_named():
    model = Flux2Model(True)
    assert list(model.condition_faults({"reference_latents": [drawn(1, 128, 4, 4)], "guidance": 3.0})) == []
    given = {"reference_latents": [drawn(1, 128, 4, 4)]}
    assert list(model.condition_faults({**given, "reference_latents_method": "uxo"})) == []
    (fault,) = model.condition_faults({**given, "reference_latents_method": "index_timestep_zero"})
    assert "'index_timestep_zero'" in fault
    (fault,) = model.condition_faults({"guidance": None})
    assert "FluxDisableGuidance" in fault
    assert list(Flux2Model(False).condition_faults({"guidance": None})) == []


def test_a_call_without_text_is_refused():
    with pytest.raises(BadRequest, match="CLIP Text Encode"):
        Flux2Model(True).read(drawn(1, 128, 4, 4), SIGMA, None)
