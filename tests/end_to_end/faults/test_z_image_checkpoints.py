"""Checkpoints of Z-Image that nothing can run: refused by name, nothing stays mapped, and the next job has its bits."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import z_image_models
from safetensors.torch import load_file, save_file

from xditd.client import BadCheckpoint, BadRequest, Client, Loan, NotFinite, Unsupported, UnsupportedDtype

State = dict[str, torch.Tensor]
PREFIX = "model.diffusion_model."
QKV = f"{PREFIX}layers.1.attention.qkv.weight"
BIAS = f"{PREFIX}t_embedder.mlp.0.bias"


@pytest.fixture(scope="module")
def state() -> State:
    return z_image_models.state_dict(0, names=z_image_models.COMFYUI, prefix=PREFIX)


@pytest.fixture(scope="module")
def lender(daemon) -> Iterator[Client]:
    with daemon.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def good(lender, state) -> Loan:
    return lender.lend(state, label="good")


@pytest.fixture(scope="module")
def good_latents(lender, good) -> torch.Tensor:
    return latents_of(lender, good)


@pytest.fixture(autouse=True)
def same_bits_and_nothing_left(client, lender, good, good_latents, unharmed) -> Iterator[None]:
    """After each test the sound checkpoint gives the bits of before, and the daemon lists what it listed."""
    before = held(client)
    yield
    assert held(client) == before
    assert torch.equal(latents_of(lender, good), good_latents)


def held(client: Client) -> tuple[object, ...]:
    """What is on loan, by the daemon's and by the workers' count."""
    status = client.status()
    return (
        [component.component_id for component in status.components],
        status.lent_bytes,
        [worker.loaded for worker in status.workers],
        status.jobs,
        [worker.pid for worker in status.workers],
    )


def latents_of(client: Client, loan: Loan) -> torch.Tensor:
    conditioning = {"prompt_embeds": z_image_models.inputs((20,), ((8, 8),))["cap_feats"]}
    return client.generate(loan, conditioning, height=64, width=64, steps=2, seed=1).result().latents


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        (QKV, None, f"missing: {QKV}"),
        (BIAS, torch.zeros(512), f"wrongly shaped: {BIAS} is [512], expected [1024]"),
        (f"{PREFIX}layers.0.extra.weight", torch.zeros(3), f"unexpected: {PREFIX}layers.0.extra.weight"),
        (
            f"{PREFIX}layers.3.attention.qkv.weight",
            torch.zeros(768, 256),
            f"missing: {PREFIX}layers.2.adaLN_modulation.0.bias",
        ),
    ],
    ids=["missing", "misshapen", "extra", "of a deeper model"],
)
@pytest.mark.parametrize("is_file", [False, True], ids=["memory", "file"])
def test_a_checkpoint_that_does_not_fit_names_the_tensor(is_file, name, tensor, named, client, state, tmp_path):
    bad = {key: each for key, each in state.items() if key != name} | ({} if tensor is None else {name: tensor})
    path = tmp_path / "bad.safetensors"
    if is_file:
        save_file(bad, path)
    with pytest.raises(BadCheckpoint) as caught:
        client.lend(path if is_file else bad, label="bad")
    where = str(path) if is_file else "bad"
    assert caught.value.detail.startswith(
        f"{where}: checkpoint does not fit z_image: lend all of its tensors, and nothing"
    )
    kind, _, what = named.partition(": ")
    assert re.search(rf"\d+ {kind}: {re.escape(what)}", caught.value.detail)
    assert named in caught.value.names


@pytest.mark.parametrize("names", [{QKV}, None], ids=["one", "all"])
def test_int8_weights_are_refused_with_the_remedy(names, client, state):
    packed = {
        name: (tensor * 40).to(torch.int8) if name in (names or state) and tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }
    expected = {f"{name} is int8" for name, tensor in packed.items() if tensor.dtype == torch.int8}
    with pytest.raises(UnsupportedDtype) as caught:
        client.lend(packed, label="packed")
    assert caught.value.detail.startswith(
        "packed: Z-Image with int8 weights cannot be run: lend its bfloat16 or float16 file, or one in fp8, int8 (with "
        f"markers) or GGUF; {len(expected)} of {len(state)} tensors: "
    )
    assert set(caught.value.names) == expected


def test_a_checkpoint_of_another_kind_or_model_is_refused_by_its_name(client, lender, good, files, state):
    with pytest.raises(BadRequest, match=r"ae\.safetensors: lent as transformer, but its .* those of flux_vae"):
        client.lend(files.vae, kind="transformer", label="vae")
    with pytest.raises(BadRequest, match="turbo: lent as vae, but its tensors are those of z_image, a transformer"):
        client.lend(state, kind="vae", label="turbo")
    lumina = {name: tensor for name, tensor in state.items() if ".adaLN_modulation." not in name}
    for block in ("layers.0", "layers.1", "noise_refiner.0", "noise_refiner.1"):
        lumina[f"{PREFIX}{block}.adaLN_modulation.1.weight"] = torch.zeros(1024, 256)
    with pytest.raises(Unsupported, match=r"lumina: .*lend .*Z-Image Turbo or Base") as caught:
        client.lend(lumina, label="lumina")
    assert set(caught.value.names) == set(lumina)
    with pytest.raises(Unsupported, match=r"both: .* cannot be lent as a whole"):
        client.lend(state | {f"vae.{name}": tensor for name, tensor in load_file(files.vae).items()}, label="both")


def test_a_transformer_of_another_family_takes_no_inputs_of_z_image(client, transformer, good):
    texts = z_image_models.inputs((20,), ((8, 8),))
    conditioning = {"prompt_embeds": texts["cap_feats"]}
    with pytest.raises(BadRequest, match="conditioning: lacks pooled_prompt_embeds; this transformer takes"):
        client.generate(transformer, conditioning, height=64, width=64, steps=2, seed=1).result()
    with pytest.raises(BadRequest, match=r"arguments: cap_feats, t, x cannot be given; it takes .*hidden_states"):
        client.call(transformer, texts)
    pooled = {"prompt_embeds": torch.ones(1, 8, 4096), "pooled_prompt_embeds": torch.ones(1, 768)}
    with pytest.raises(BadRequest, match="pooled_prompt_embeds"):
        client.generate(good.component_id, pooled, height=64, width=64, steps=2, seed=1).result()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", [QKV, BIAS, f"{PREFIX}cap_pad_token", f"{PREFIX}noise_refiner.1.ffn_norm2.weight"])
def test_weights_that_are_not_finite_are_named_with_the_step(name, value, client, state):
    broken = state | {name: state[name].clone()}
    broken[name].view(-1)[-1] = value
    with client.lend(broken, label="broken") as loan:
        who = rf"transformer {loan.component_id} \(broken\)"
        with pytest.raises(NotFinite, match=rf"{who}: latents after step 1 of 2: some values are NaN or infinite"):
            latents_of(client, loan)
        with pytest.raises(NotFinite, match=rf"{who}: result at t 0\.2: some values are NaN or infinite"):
            client.call(loan, z_image_models.inputs((20,), ((8, 8),)))


def test_weights_that_a_call_does_not_use_may_be_nan(client, state, relative_error):
    """As in diffusers' class: the token that fills up a text is read for no text that needs none."""
    broken = state | {f"{PREFIX}cap_pad_token": torch.full((1, 256), torch.nan)}
    whole, filled = (z_image_models.inputs((tokens,), ((16, 16),)) for tokens in (32, 31))
    with torch.no_grad():
        (expected,) = z_image_models.reference(broken)(**whole, return_dict=False)[0]
    with client.lend(broken, label="broken") as loan:
        ((found,),) = client.call(loan, whole)
        assert relative_error(found, expected) <= 1e-6
        with pytest.raises(NotFinite, match=r"result at t 0\.2"):
            client.call(loan, filled)
