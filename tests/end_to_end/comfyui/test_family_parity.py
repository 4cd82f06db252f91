"""Each variant of each family in ComfyUI: the latents of stock, through ComfyUI's own nodes, in float32."""

from __future__ import annotations

from typing import Any

import lora_files
import pytest
import torch
from comfyui_families import PREFIX, VARIANTS
from safetensors.torch import load_file

from xditd.ipc.errors import Unsupported
from xditd.ipc.tensors import ComponentKind

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

BAR = 1e-6
GUIDED_BAR = 3e-6
"""At cfg 5, which multiplies the roundings of both predictions by five and four: up to 2.4e-6 were found. Stock is
as far from itself if the last bits of its inputs change; ``test_float64.py`` compares both with float64."""

KONTEXT = ("flux1_dev", "flux2_dev", "flux2_klein", "qwen_image", "qwen_image_edit_2511")
"""Variants that take reference latents."""
ARCHITECTURES = (
    "flux1_dev", "flux2_dev", "qwen_image_edit_2511", "wan21_image", "wan22_ti2v", "wan_vace", "z_image",
)  # fmt: skip
"""A variant of each kind of layers."""


def case_of(variant: Any, case: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return conditioning and latents, and the sampler's options."""
    if case == "rows":  # a batch of two, of odd sides
        texts = (variant.text(seed, size=variant.odd) for seed in (1, 2))
        return (*texts, variant.latent(2, variant.odd)), {}
    if case == "lengths":  # texts of unequal lengths are not in one call
        sampler, scheduler = variant.sampler
        longer = 41 if variant.tokens == 16 else variant.tokens
        given = (variant.text(1, longer), variant.text(2), variant.latent())
        return given, {"sampler_name": sampler, "scheduler": scheduler, "cfg": 5.0}
    assert case == "denoise"
    return (variant.text(1), variant.text(2), variant.latent(seed=5)), {"cfg": 5.0, "denoise": 0.6}


@pytest.mark.parametrize("case", ["rows", "lengths", "denoise"])
@pytest.mark.parametrize("name", VARIANTS)
def test_samplers(name, case, weightless, stock, ksample, relative_error):
    args, options = case_of(VARIANTS[name], case)
    ours, theirs = (ksample(model(name), *args, **options) for model in (weightless, stock))
    assert theirs.std() > 0.1
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= (GUIDED_BAR if "cfg" in options else BAR)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stock_model_can_be_accelerated(name, connected, stock, ksample, relative_error):
    from xditd.client.comfyui.accelerate import accelerate

    args, options = case_of(VARIANTS[name], "lengths")
    ours, theirs = (ksample(model, *args, **options) for model in (accelerate(stock(name)), stock(name)))
    assert relative_error(ours, theirs) <= GUIDED_BAR


@pytest.mark.parametrize(("sizes", "cfg"), [(((5, 6),), 1.0), (((6, 10), (9, 7)), 5.0), (((20, 12),), 1.0)], ids=str)
@pytest.mark.parametrize("name", KONTEXT)
def test_references(name, sizes, cfg, weightless, stock, ksample, relative_error):
    variant = VARIANTS[name]
    positive, negative = (variant.text(seed, **variant.references(*sizes)) for seed in (1, 2))
    ours, theirs = (
        ksample(model(name), positive, negative, variant.latent(), cfg=cfg) for model in (weightless, stock)
    )
    assert relative_error(ours, theirs) <= (GUIDED_BAR if cfg > 1 else BAR)
    without = ksample(stock(name), variant.text(1), variant.text(2), variant.latent(), cfg=cfg)
    assert relative_error(without, theirs) > 1e-3


METHODS = ("offset", "index", "uxo/uno", "index_timestep_zero")
OBEYED = {
    "flux1_dev": ("offset", "index", "uxo/uno"),
    "flux2_dev": ("offset", "index", "uxo/uno"),
    "qwen_image": ("index",),
    "qwen_image_edit_2511": ("index_timestep_zero",),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OBEYED)
def test_methods_of_references_are_obeyed_or_refused(name, method, weightless, stock, ksample, relative_error):
    from comfy_extras.nodes_flux import FluxKontextMultiReferenceLatentMethod

    variant = VARIANTS[name]
    positive = variant.text(1, **variant.references((6, 10), (9, 7)))
    (positive,) = FluxKontextMultiReferenceLatentMethod.execute(positive, method).result
    given = positive, variant.text(2), variant.latent()
    if method in OBEYED[name]:
        assert relative_error(*(ksample(model(name), *given) for model in (weightless, stock))) <= BAR
    else:
        with pytest.raises(Unsupported, match=f"reference latents by the method '{method.partition('/')[0]}'"):
            ksample(weightless(name), *given)


@pytest.mark.parametrize("through", ["load_lora_for_models", "load_bypass_lora_for_models"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_lora_is_a_branch(name, through, comfy, variant_file, weightless, stock, ksample, relative_error):
    """As LoraLoaderModelOnly and LoraLoaderBypassModelOnly load it, on every linear layer."""
    variant = VARIANTS[name]
    shapes = lora_files.matrices(load_file(variant_file(name)), prefix=PREFIX)
    lora = lora_files.make(shapes, "comfyui", 1, ranks=(3, 4)).tensors
    load = getattr(comfy.comfy.sd, through)
    args = variant.text(1), variant.text(2), variant.latent()
    plain = ksample(stock(name), *args, steps=2)
    model = load(weightless(name), None, lora, 0.7, 0.0)[0]
    ours, theirs = (
        ksample(each, *args, steps=2) for each in (model, load(stock(name).clone(), None, lora, 0.7, 0.0)[0])
    )
    assert relative_error(theirs, plain) > 1e-2
    assert relative_error(ours, theirs) <= BAR
    assert not model.weights._merged, "every layer is a branch"


@pytest.mark.parametrize(
    ("name", "conditioned_as"),
    [("wan22_image", "wan22_image"), ("wan22_image", "wan21_two_images"), ("wan_vace", "wan_vace")],
    ids=["first image", "first and last image", "VACE"],
)
def test_a_pair_of_advanced_samplers(name, conditioned_as, comfy, daemon, weightless, stock, relative_error):
    """Wan 2.2: one model samples the first steps, another the rest; both stay lent.

    What a CLIP vision model saw, ComfyUI drops for models of Wan 2.2.
    """
    variant = VARIANTS[conditioned_as]
    found = []
    for load in (weightless, stock):
        sample = comfy.nodes.KSamplerAdvanced().sample
        given = dict(steps=4, sampler_name="euler", scheduler="simple", positive=variant.text(1))
        given |= dict(negative=variant.text(2), noise_seed=7)
        high, low = load(name), load(name, 7)
        (half,) = sample(
            model=high, cfg=1.0, add_noise="enable", latent_image=variant.latent(), start_at_step=0, end_at_step=2,
            return_with_leftover_noise="enable", **given,
        )  # fmt: skip
        (whole,) = sample(
            model=low, cfg=1.0, add_noise="disable", latent_image=half, start_at_step=2, end_at_step=4,
            return_with_leftover_noise="disable", **given,
        )  # fmt: skip
        found.append(whole["samples"])
        if load is weightless:
            assert len([each for each in daemon.status().components if each.kind == ComponentKind.TRANSFORMER]) == 2
    assert relative_error(*found) <= BAR


@pytest.mark.parametrize("options", [{}, {"cfg": 5.0, "sampler_name": "uni_pc"}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_first_frame_at_the_time_zero(options, batch, weightless, stock, ksample, relative_error):
    """Wan 2.2 TI2V with the latents of Wan22ImageToVideoLatent: a first frame, and a mask that keeps it."""
    variant = VARIANTS["wan22_ti2v"]
    latent = variant.latent(batch, (3, 5, 6), seed=5)
    latent["noise_mask"] = torch.ones(batch, 1, 3, 5, 6)
    latent["noise_mask"][:, :, :1] = 0.0
    args = variant.text(1), variant.text(2)
    ours, theirs = (ksample(model("wan22_ti2v"), *args, dict(latent), **options) for model in (weightless, stock))
    assert relative_error(ours, theirs) <= (GUIDED_BAR if options else BAR)
    without = ksample(stock("wan22_ti2v"), *args, {"samples": latent["samples"]}, **options)
    assert relative_error(without, theirs) > 1e-2


@pytest.mark.parametrize("name", ["wan_text", "qwen_image"])
def test_model_sampling_of_the_family(name, comfy, weightless, stock, ksample, relative_error):
    """The shift that workflows of these families set."""
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow, ModelSamplingSD3

    variant = VARIANTS[name]
    node, method = (ModelSamplingSD3, "patch") if name == "wan_text" else (ModelSamplingAuraFlow, "patch_aura")
    args = variant.text(1), variant.text(2), variant.latent()
    found = [ksample(getattr(node(), method)(model(name), 5.0)[0], *args) for model in (weightless, stock)]
    assert relative_error(*found) <= BAR
    assert relative_error(found[1], ksample(stock(name), *args)) > 1e-3
