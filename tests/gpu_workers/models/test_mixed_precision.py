"""Checkpoints of several dtypes give what diffusers' own modules give with these very dtypes, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from xditd.client.demo.checkpoints import flux1_state_dict, flux_vae_state_dict
from xditd.gpu_workers.families.flux1 import reference
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.mixed_precision import compute_in_widest, convolve, widest
from xditd.gpu_workers.models.model_cache import ModelCache

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
SMALL = {"heads": 1, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 32}


def with_float32_norms(state: State, dtype: torch.dtype) -> State:
    return {name: tensor if "norm" in name else tensor.to(dtype) for name, tensor in state.items()}


def given_transformer() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(2, 5, 64, generator=generator),
        "pooled": torch.randn(2, 32, generator=generator),
        "noise": torch.randn(2, 16, 4, 6, generator=generator),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_transformer_with_float32_norms_has_the_bits_of_diffusers(
    cache: ModelCache, plug: Plugger, direct: ModuleType, dtype: torch.dtype
) -> None:
    state = with_float32_norms(flux1_state_dict(0, **SMALL), dtype)
    match = plug(cache, state)
    given = given_transformer()
    size = {"height": 32, "width": 48, "steps": 3}
    latents = direct.generate(match.model, **given, **size)
    model = reference.transformer_from(state)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype, torch.float32}
    expected = reference.reference_latents(
        model,
        prompt_embeds=given["prompt_embeds"],
        pooled_prompt_embeds=given["pooled"],
        noise=given["noise"],
        **size,
    )
    assert latents.dtype == dtype
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_vae_with_float32_norms_has_the_bits_of_diffusers(
    cache: ModelCache, plug: Plugger, direct: ModuleType, dtype: torch.dtype
) -> None:
    state = with_float32_norms(flux_vae_state_dict(0), dtype)
    cached = plug(cache, state).model
    generator = torch.Generator().manual_seed(0)
    latents, image = torch.randn(2, 16, 4, 6, generator=generator), torch.rand(1, 3, 32, 48, generator=generator)
    model = reference.vae_from(state)
    assert torch.equal(direct.decode(cached, latents).clamp(-1.0, 1.0), reference.reference_decode(model, latents))
    assert torch.equal(direct.encode(cached, image), reference.reference_encode(model, image))


@pytest.mark.parametrize(
    "dtypes",
    [
        {"weight": torch.float32, "bias": torch.bfloat16},
        {"weight": torch.bfloat16, "bias": torch.float32},
        {"weight": torch.float16, "bias": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: torch.nn.Linear(32, 64), (3, 32)),
        (lambda: torch.nn.Conv2d(32, 64, 3), (1, 32, 5, 5)),
        (lambda: torch.nn.GroupNorm(8, 32), (2, 32, 5)),
    ],
    ids=["linear", "convolution", "norm"],
)
def test_layers_that_torch_itself_cannot_mix_run_in_the_widest_dtype(make, shape, device: str, dtypes) -> None:
    """Hooks are the same for every device, so that those for GPUs are tried here, on the CPU."""
    torch.manual_seed(0)
    layer, x = make().requires_grad_(False), torch.randn(shape, dtype=torch.bfloat16)
    for name, dtype in dtypes.items():
        setattr(layer, name, torch.nn.Parameter(torch.randn_like(getattr(layer, name)).to(dtype), requires_grad=False))
    lent = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    exact = make().requires_grad_(False)
    exact.load_state_dict(layer.state_dict())
    model = torch.nn.Sequential(layer)
    exceptions = {f"0.{name}": dtype for name, dtype in dtypes.items() if dtype != torch.bfloat16}
    compute_in_widest(model, exceptions, torch.device(device))
    result = model(x)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, exact(x.float()).bfloat16())
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == lent


def test_a_model_with_any_tensor_kept_wider_runs(cache: ModelCache, plug: Plugger, direct: ModuleType) -> None:
    exact = flux1_state_dict(0, **SMALL)
    given = given_transformer()
    for name in exact:
        state = {other: tensor if other == name else tensor.bfloat16() for other, tensor in exact.items()}
        match = plug(cache, state)
        result = direct.generate(match.model, **given, height=32, width=48, steps=1)
        assert result.dtype == torch.bfloat16, name
        assert result.isfinite().all(), name


def test_each_mixture_of_dtypes_has_a_model_of_its_own(cache: ModelCache, plug: Plugger) -> None:
    exact = flux1_state_dict(0, **SMALL)
    states = [
        {name: tensor.bfloat16() for name, tensor in exact.items()},
        with_float32_norms(exact, torch.bfloat16),
        with_float32_norms(flux1_state_dict(1, **SMALL), torch.bfloat16),
    ]
    plain, mixed, again = (plug(cache, state).model for state in states)
    assert plain is not mixed
    assert mixed is again
    assert plain.dtype == mixed.dtype == torch.bfloat16


def test_a_convolution_with_other_padding_does_as_its_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 4, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 8, 5, 5, dtype=torch.bfloat16)
    result = convolve(x, layer, padding=(1, 1))
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, layer(x.float()).bfloat16())
    layer.bfloat16()
    assert torch.equal(convolve(x, layer, padding=(1, 1)), layer(x))


def test_the_widest_dtype_holds_both_halves() -> None:
    assert widest([torch.bfloat16, torch.float16]) == torch.float32
    assert widest([torch.bfloat16, torch.bfloat16]) == torch.bfloat16
