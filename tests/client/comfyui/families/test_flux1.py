"""FLUX.1's adapter converts ComfyUI's arguments to those of diffusers' class, and results back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_calls import arguments_of, drawn

from xditd.client import BadRequest
from xditd.client.comfyui.families.flux1 import Flux1Model
from xditd.client.families.flux1 import image_positions, pack
from xditd.client.jobs.arguments import KeptTensor, RowsOf
from xditd.ipc.limits import MAX_STEPS


@pytest.fixture
def model() -> Flux1Model:
    return Flux1Model(pooled_channels=12, has_guidance=True)


def test_arguments_are_as_the_class_takes_them(model):
    x, context, y = drawn(2, 16, 4, 6), drawn(2, 5, 32), drawn(2, 20)
    sigma, guidance = torch.tensor([0.7, 0.7]), torch.tensor([3.5])
    found = arguments_of(model, x, sigma, context, y, guidance)
    assert next(iter(found)) == "hidden_states"  # results come where the first tensor is
    assert torch.equal(found["hidden_states"], pack(x).to(torch.bfloat16))
    assert (found["timestep"].dtype, found["timestep"].tolist()) == (torch.float32, sigma.tolist())
    assert (found["guidance"].dtype, found["guidance"].tolist()) == (torch.float32, [3.5, 3.5])
    embeds, pooled = found["encoder_hidden_states"], found["pooled_projections"]
    for rows, expected in ((embeds, context), (pooled, y[:, :12])):
        assert [times for _, times in rows.parts] == [1, 1]
        joined = torch.cat([kept.tensor for kept, _ in rows.parts])
        assert torch.equal(joined, expected.to(torch.bfloat16))
    assert torch.equal(found["img_ids"].tensor, image_positions(2, 3))
    assert torch.equal(found["txt_ids"].tensor, torch.zeros(5, 3))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Sides of 4 x 6, then 6 x 2 latents beside an image of 4 x 4, in tokens: plane, top, left of the first one.
        ("offset", [(1, 0, 0), (1, 0, 3)]),
        ("index", [(1, 0, 0), (2, 0, 0)]),
        ("uxo", [(0, 2, 2), (0, 4, 5)]),
    ],
)
def test_references_are_further_tokens_at_their_places(model, method, expected):
    x, first, second = drawn(2, 16, 4, 4), drawn(2, 16, 4, 6, seed=2), drawn(2, 16, 6, 2, seed=3)
    found = arguments_of(
        model, x, torch.tensor([0.5]), drawn(2, 5, 32), ref_latents=[first, second], ref_latents_method=method,
        dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(found["hidden_states"], torch.cat([pack(x), pack(first), pack(second)], dim=1))
    ids = found["img_ids"].tensor
    assert torch.equal(ids[:4], image_positions(2, 2))
    assert [tuple(ids[at].int().tolist()) for at in (4, 10)] == expected
    call = model.read(x, torch.tensor([0.5]), drawn(2, 5, 32), ref_latents=[first, second])
    assert torch.equal(call.prediction(slice(0, 2), [(found["hidden_states"],)]), x)


def test_equal_rows_share_what_is_kept(model):
    context, y = drawn(1, 5, 32).repeat(3, 1, 1), drawn(1, 12).repeat(3, 1)
    found = arguments_of(model, drawn(3, 16, 4, 4), torch.full((3,), 0.5), context, y, torch.tensor([1.0]))
    for name in ("encoder_hidden_states", "pooled_projections"):
        assert isinstance(found[name], RowsOf)
        assert [times for _, times in found[name].parts] == [3]
    one = arguments_of(model, drawn(1, 16, 4, 4), torch.tensor([0.5]), context[:1], y[:1], torch.tensor([1.0]))
    assert isinstance(one["encoder_hidden_states"], KeptTensor)


def test_positions_are_kept_once_for_each_size(model):
    def ids(height: int, tokens: int) -> tuple[Any, Any]:
        given = drawn(1, 16, height, 4), torch.tensor([0.5]), drawn(1, tokens, 32), drawn(1, 12)
        found = arguments_of(model, *given)
        return found["img_ids"], found["txt_ids"]

    first = ids(4, 5)
    assert ids(4, 5) == first
    assert ids(6, 5)[0] is not first[0]
    for height in range(8, 40, 2):
        ids(height, 5)
    assert ids(4, 5)[0] is not first[0]  # only a few are remembered


def test_without_a_pooled_state_zeros_and_without_guidance_none():
    model = Flux1Model(pooled_channels=12, has_guidance=False)
    found = arguments_of(model, drawn(1, 16, 4, 4), torch.tensor([0.5]), drawn(1, 5, 32), None, torch.tensor([3.5]))
    assert torch.equal(found["pooled_projections"].tensor, torch.zeros(1, 12, dtype=torch.bfloat16))
    assert "guidance" not in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prediction_has_the_shape_and_dtype_of_comfyuis_latents(model, dtype):
    x = drawn(3, 16, 4, 6).to(dtype)
    call = model.read(x, torch.tensor([0.5]), drawn(3, 5, 32), drawn(3, 12))
    found = call.prediction(slice(0, 2), [(pack(x[:2].float()),)])
    assert found.dtype is dtype
    assert torch.equal(found, x[:2])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"control": {"input": [drawn(1, 4, 8)]}}, "ControlNet whose residuals another node has changed"),
        ({"ref_latents": [drawn(1, 16, 4, 4)], "ref_latents_method": "index_timestep_zero"}, "index_timestep_zero"),
        ({"attention_mask": 1}, "attention mask"),
    ],
)
def test_what_cannot_be_run_is_named(model, more, said):
    call = model.read(drawn(1, 16, 4, 4), torch.tensor([0.5]), drawn(1, 5, 32), **more)
    (fault,) = call.faults
    assert said in fault


def test_a_call_without_text_is_refused(model):
    with pytest.raises(BadRequest, match="CLIP Text Encode"):
        model.read(drawn(1, 16, 4, 4), torch.tensor([0.5]), None)


def test_what_is_foreseen_can_be_given():
    model = Flux1Model(pooled_channels=12, has_guidance=True)
    assert model.schedule_values([1.5, 1.0, 0.5, 0.0, -1.0]) == {"timestep": [1.0, 0.5, 0.0]}
    assert len(model.schedule_values([0.5] * (MAX_STEPS + 1))["timestep"]) == MAX_STEPS
