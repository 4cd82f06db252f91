"""An adapter with the wrapper ``apply_model``, for families whose ComfyUI class calls no wrapper of its forward.

No shipped family needs it. With it FLUX.1 gives the same bits as with its own adapter.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from xditd.client.comfyui.families import flux1

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


class WholeModel(flux1.Flux1Model):
    """FLUX.1 as a class whose forward cannot be wrapped: sigmas come in, and denoised latents go out."""

    wrapper = "apply_model"

    def __init__(self, model: Any) -> None:
        params = model.diffusion_model.params
        super().__init__(params.vec_in_dim, params.guidance_embed)
        # The loan ends with the model, so the adapter does not keep it alive.
        self._model = weakref.ref(model)

    def read(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None = None,
        c_crossattn: torch.Tensor | None = None,
        control: object | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **conditions: Any,
    ) -> WholeCall:
        """Read a call of ``BaseModel._apply_model``, and do what ComfyUI does there before the forward."""
        model = self._model()
        assert model is not None
        sampling = model.model_sampling  # of this run: nodes replace it
        inner = super().read(
            sampling.calculate_input(t, x),
            sampling.timestep(t).float(),
            c_crossattn,
            control=control,
            transformer_options=transformer_options,
            **conditions,
        )
        return WholeCall(**vars(inner), sampling=sampling, noisy=x, sigma=t)


@dataclass(frozen=True, eq=False, kw_only=True)
class WholeCall(flux1.Flux1Call):
    """A call whose prediction is the denoised latents of ``noisy`` at ``sigma``."""

    sampling: Any
    noisy: torch.Tensor
    sigma: torch.Tensor

    def prediction(self, rows: slice, results: Sequence[Any]) -> torch.Tensor:
        predicted = super().prediction(rows, results).float()
        denoised: torch.Tensor = self.sampling.calculate_denoised(self.sigma[rows], predicted, self.noisy[rows])
        return denoised


@pytest.fixture
def through_apply_model(remote, files, monkeypatch) -> Any:
    """The same file as ``remote``, which was loaded before the family was changed."""
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    monkeypatch.setattr(flux1.Flux1, "adapt", lambda self, model: WholeModel(model))
    loaded = load_unet(str(files.transformer))
    assert (loaded.family.wrapper, remote.family.wrapper) == ("apply_model", "diffusion_model")
    return loaded


@pytest.mark.parametrize("case", [{}, {"cfg": 3.0}, {"sampler_name": "dpmpp_2m", "denoise": 0.6}], ids=str)
def test_bits_of_the_same_family(case, through_apply_model, remote, conditioning, ksample, latent):
    samples = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    found = [
        ksample(model, conditioning(1), conditioning(2, 21), {"samples": samples}, **case)
        for model in (through_apply_model, remote)
    ]
    assert found[0].std() > 0.1
    assert torch.equal(*found)


def test_model_sampling_of_the_run_counts(comfy, through_apply_model, remote, conditioning, ksample, latent):
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    def shifted(model: Any) -> Any:
        (patched,) = ModelSamplingFlux().patch(model, max_shift=3.0, base_shift=0.5, width=1024, height=1024)
        return patched

    found = [
        ksample(shifted(model), conditioning(1), conditioning(2), latent) for model in (through_apply_model, remote)
    ]
    assert torch.equal(*found)
    assert not torch.equal(found[0], ksample(remote, conditioning(1), conditioning(2), latent))
