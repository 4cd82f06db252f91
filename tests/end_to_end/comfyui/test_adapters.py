"""A family's adapter: ComfyUI's module and the diffusers class with the adapter's arguments agree.

In one process without workers, so that only the adapter can cause a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from xditd.client.jobs.arguments import KeptTensor, RowsOf
from xditd.gpu_workers.families.flux1 import reference

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 2e-6


def given(value: Any) -> Any:
    """Convert an argument as the workers do."""
    if isinstance(value, KeptTensor):
        return value.tensor
    if isinstance(value, RowsOf):
        parts = [(given(tensor), times) for tensor, times in value.parts]
        return torch.cat([tensor.repeat_interleave(times, dim=0) for tensor, times in parts])
    return value


@pytest.fixture(scope="module")
def diffusers_model(files) -> FluxTransformer2DModel:
    """The same checkpoint as diffusers loads it."""
    return reference.load_transformer(files.transformer)


@pytest.fixture(scope="module")
def predict(local, diffusers_model) -> Callable[..., torch.Tensor]:
    """Predict as the workers do: call the diffusers class with the adapter's arguments."""
    from xditd.client.comfyui.families import adapter_of_model
    from xditd.client.comfyui.step_inputs import StepInputs

    family = adapter_of_model(local.model)
    assert family is not None
    adapter = family.adapt(local.model)

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        call = adapter.read(*args, **kwargs)
        numbers, kept = StepInputs().read(
            call.rows, call.numbers, call.texts, lambda texts: adapter.keep_row(texts, KeptTensor, torch.float32)
        )
        rows = slice(0, call.rows)
        results = [
            diffusers_model(**{name: given(value) for name, value in forward.items()}, return_dict=False)
            for forward in call.arguments(rows, numbers, kept, KeptTensor, torch.float32)
        ]
        return call.prediction(rows, results)

    return run


@pytest.mark.parametrize(("rows", "height", "width"), [(1, 16, 16), (2, 8, 12), (1, 15, 16), (3, 6, 7)])
@torch.inference_mode()
def test_flux1(rows, height, width, comfy, local, predict, relative_error):
    comfy.comfy.model_management.load_models_gpu([local])
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 16, height, width, generator=generator)
    context = torch.randn(rows, 9, 4096, generator=generator)
    context[-1] = context[0]
    sigmas = torch.rand(rows, generator=generator)
    more = {"y": torch.randn(rows, 768, generator=generator), "guidance": torch.tensor([2.5])}
    expected = local.model.diffusion_model(x, sigmas, context, **more, transformer_options={})
    assert expected.std() > 0.1
    assert relative_error(predict(x, sigmas, context, **more, transformer_options={}), expected) <= TOLERANCE
    assert (
        relative_error(predict(x, sigmas, context, transformer_options={}, guidance=more["guidance"]), expected) > 1e-3
    )
