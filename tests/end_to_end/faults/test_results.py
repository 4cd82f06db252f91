"""Weights that give NaN or infinity: every job says which component, result and step, and nobody gets such a result."""

from __future__ import annotations

import pytest
import text_checkpoints
import torch

from xditd.client import BadRequest, NotFinite
from xditd.client.demo import checkpoints
from xditd.client.demo.flux1_calls import Flux1Calls


def poisoned(state, name):
    """The same weights with one NaN, in the middle of a tensor."""
    state = {key: tensor.clone() for key, tensor in state.items()}
    tensor = state[name].view(-1)
    tensor[len(tensor) // 2] = torch.nan
    return state


@pytest.fixture
def broken(client):
    """A transformer with one NaN."""
    with client.lend(poisoned(checkpoints.flux1_state_dict(3), "img_in.bias"), label="broken") as loan:
        yield loan


@pytest.fixture
def broken_vae(client):
    state = checkpoints.flux_vae_state_dict(3)
    both = poisoned(poisoned(state, "decoder.conv_out.bias"), "encoder.conv_in.bias")
    with client.lend(both, label="broken-vae") as loan:
        yield loan


def named(loan, result):
    return rf"{loan.kind.value} {loan.component_id} \({loan.label}\): {result}: some values are NaN or infinite"


def generate(client, loan, inputs, **more):
    given = {"height": inputs.pixels, "width": inputs.pixels, "steps": 3, "noise": inputs.noise} | more
    return client.generate(loan, inputs.conditioning, **given).result()


@pytest.mark.parametrize("more", [{}, {"vae": True}, {"step_cache": 0.1}, {"previews": True}], ids=str)
def test_a_transformer_in_generate(more, client, broken, files, make_inputs):
    with client.lend(files.vae) as vae:
        if "vae" in more:
            more = {"vae": vae}
        with pytest.raises(NotFinite, match=named(broken, "latents after step 1 of 3")) as caught:
            generate(client, broken, make_inputs(), **more)
    assert not caught.value.retryable


def test_a_transformer_in_a_call(client, broken, transformer, make_inputs):
    inputs = make_inputs()
    with pytest.raises(NotFinite, match=named(broken, "result at timestep 0.75")):
        Flux1Calls(client, broken).predict(inputs.noise, 0.75, inputs.prompt)
    assert Flux1Calls(client, transformer).predict(inputs.noise, 0.75, inputs.prompt).isfinite().all()


@pytest.mark.parametrize("pixels", [128, 512], ids=["by rank 0", "by both ranks"])
def test_a_vae(pixels, client, transformer, broken_vae, make_inputs):
    inputs = make_inputs(pixels=pixels)
    with pytest.raises(NotFinite, match=named(broken_vae, "image")):
        client.decode(broken_vae, inputs.noise)
    if pixels == 512:
        return
    with pytest.raises(NotFinite, match=named(broken_vae, "image")):
        generate(client, transformer, inputs, steps=1, vae=broken_vae)
    with pytest.raises(NotFinite, match=named(broken_vae, "latents")):
        client.encode(broken_vae, torch.zeros(1, 3, 64, 64))
    inputs.noise[0, 3, 1, 1] = torch.nan
    with pytest.raises(BadRequest, match="latents: some values are not finite"):  # the caller's
        client.decode(broken_vae, inputs.noise)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_text_encoder(kind, client):
    made, name = {
        "clip": (text_checkpoints.clip_l_state_dict, "text_model.final_layer_norm.bias"),
        "t5": (text_checkpoints.t5_state_dict, "encoder.final_layer_norm.weight"),
    }[kind]
    loan = client.lend(poisoned(made(3), name), label="broken-text")
    with loan, pytest.raises(NotFinite, match=named(loan, "hidden states")):
        client.encode_text(loan, torch.ones(1, 8, dtype=torch.int64))


def test_half_precision_that_overflows(client, make_inputs):
    """The weights are finite, and so is the result in float32."""
    inputs = make_inputs()
    state = checkpoints.flux1_state_dict(3)
    state["final_layer.linear.bias"] += 60_000.0
    state["final_layer.linear.weight"] *= 4_000.0
    half = client.lend({name: tensor.half() for name, tensor in state.items()}, label="half")
    with half, pytest.raises(NotFinite, match=named(half, "result at timestep 1") + ".*more range"):
        Flux1Calls(client, half).predict(inputs.noise, 1.0, inputs.prompt)
    with client.lend(state, label="whole") as whole:
        assert Flux1Calls(client, whole).predict(inputs.noise, 1.0, inputs.prompt).isfinite().all()
        with pytest.raises(NotFinite, match=named(whole, "latents after step 3 of 3") + " in float16"):
            generate(client, whole, inputs, noise=inputs.noise.half())
