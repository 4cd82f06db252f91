"""Nodes that a stock model obeys give the same result on a remote MODEL, through both samplers.

Each node changes the stock result by far more than the tolerance, so that an ignored node fails the test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-5
EFFECT = 1e-3

Change = Callable[[Any, Any], Any]


def node(module: str, name: str, *args: Any, **more: Any) -> Change:
    """Return a function that runs a stock node from MODEL to MODEL."""

    def apply(comfy: Any, model: Any) -> Any:
        import importlib

        found = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
        if hasattr(found, "execute"):
            return found.execute(model, *args, **more).result[0]
        made = found()
        return getattr(made, made.FUNCTION)(model, *args, **more)[0]

    return apply


def wrapped(kind: str) -> Change:
    """A wrapper of another pack that halves the result, or for the outermost kinds the input noise."""

    def halve(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if kind in ("outer_sample", "sampler_sample"):
            at = 0 if kind == "outer_sample" else 4
            args = (*args[:at], 0.5 * args[at], *args[at + 1 :])
            return executor(*args, **kwargs)
        if kind == "prepare_sampling":
            model, conds, models = executor(*args, **kwargs)
            for part in conds["positive"]:
                part["cross_attn"] = 0.5 * part["cross_attn"]
            return model, conds, models
        found = executor(*args, **kwargs)
        return [0.5 * each for each in found] if isinstance(found, list) else 0.5 * found

    def apply(comfy: Any, model: Any) -> Any:
        patched = model.clone()
        patched.add_wrapper_with_key(kind, "other", halve)
        return patched

    return apply


def option(name: str, value: Any) -> Change:
    def apply(comfy: Any, model: Any) -> Any:
        patched = model.clone()
        patched.model_options[name] = value
        return patched

    return apply


def halve_prediction(apply_model: Any, given: dict[str, Any]) -> Any:
    return 0.5 * apply_model(given["input"], given["timestep"], **given["c"])


def halve_conditions(args: dict[str, Any]) -> list[Any]:
    import comfy.samplers

    found = comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
    )
    return [0.5 * each for each in found]


WINDOWS = (8, 2, "standard_static", 1, False, "pyramid", 2, False)

CASES: dict[str, tuple[Change, str, dict[str, Any]]] = {
    "ContextWindowsManual": (node("context_windows", "ContextWindowsManualNode", *WINDOWS), "ContextWindows", {}),
    "ModelSamplingAuraFlow": (node("model_advanced", "ModelSamplingAuraFlow", 3.0), "ModelSamplingSD3", {}),
    "ModelSamplingFlux": (node("model_advanced", "ModelSamplingFlux", 1.5, 0.5, 512, 512), "fused", {}),
    "EpsilonScaling": (node("eps", "EpsilonScaling", 1.05), "EpsilonScaling", {}),
    "EasyCache": (node("easycache", "EasyCacheNode", 3.0, 0.0, 1.0, False), "easycache", {"steps": 6}),
    "LazyCache": (node("easycache", "LazyCacheNode", 3.0, 0.0, 1.0, False), "lazycache", {"steps": 6}),
    "RescaleCFG": (node("model_advanced", "RescaleCFG", 0.7), "RescaleCFG", {"cfg": 3.0}),
    "CFGZeroStar": (node("cfg", "CFGZeroStar"), "CFGZeroStar", {"cfg": 3.0}),
    "CFGNorm": (node("cfg", "CFGNorm", 0.8), "CFGNorm", {"cfg": 3.0}),
    "APG": (node("apg", "APG", 0.5, 2.0, -0.2), "APG", {"cfg": 3.0}),
    "TCFG": (node("tcfg", "TCFG"), "TCFG", {"cfg": 3.0}),
    "Mahiro": (node("mahiro", "Mahiro"), "Mahiro", {"cfg": 3.0}),
    "DifferentialDiffusion": (node("differential_diffusion", "DifferentialDiffusion"), "mask", {"mask": True}),
    "model_function_wrapper": (option("model_function_wrapper", halve_prediction), "model_function_wrapper", {}),
    "calc_cond_batch_function": (option("sampler_calc_cond_batch_function", halve_conditions), "calc_cond_batch", {}),
    **{
        f"wrapper-{kind}": (wrapped(kind), f"({kind})", {})
        for kind in (
            "apply_model", "calc_cond_batch", "diffusion_model", "outer_sample", "predict_noise", "prepare_sampling",
            "sampler_sample",
        )
    },
    "callback-on_clone": (lambda comfy, model: clone_halves(model), "on_clone", {}),
    "callback-on_pre_run": (lambda comfy, model: pre_run_halves(model), "on_pre_run", {}),
    "callback-on_load_after": (lambda comfy, model: load_halves(model), "on_load_after", {}),
}  # fmt: skip
"""Changes by name: the change, the note of XDiT KSampler, and the inputs."""


def clone_halves(model: Any) -> Any:
    def change(_: Any, made: Any) -> None:
        made.set_model_sampler_post_cfg_function(lambda args: 0.5 * args["denoised"])

    patched = model.clone()
    patched.add_callback_with_key("on_clone", "other", change)
    return patched.clone()


def halving_while(model: Any, kind: str) -> Any:
    """A MODEL whose CFG function halves once a callback of a kind has been called."""
    called: list[bool] = []
    patched = model.clone()
    patched.add_callback_with_key(kind, "other", lambda *_: called.append(True))
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * (0.5 if called else 1.0))
    return patched


def pre_run_halves(model: Any) -> Any:
    return halving_while(model, "on_pre_run")


def load_halves(model: Any) -> Any:
    return halving_while(model, "on_load_after")


@pytest.mark.parametrize("name", CASES)
def test_a_change_of_the_model(name, comfy, remote, local, xsample, conditioning, ksample, latent, relative_error):
    change, said, more = CASES[name]
    options = dict(more)
    latent["samples"] = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    if options.pop("mask", False):
        latent["noise_mask"] = torch.linspace(0, 1, 128).expand(1, 128, 128).contiguous()
    given = (conditioning(1), conditioning(2))
    comfy.comfy.model_management.unload_all_models()
    expected = ksample(change(comfy, local), *given, dict(latent), **options)
    assert relative_error(expected, ksample(local, *given, dict(latent), **options)) > EFFECT
    samples, _, note = xsample(change(comfy, remote), latent_image=dict(latent), **options)
    assert relative_error(samples, expected) <= TOLERANCE
    assert said in note or "cfg 3" in note
    assert note.startswith("fused" if said == "fused" else "step by step")


@pytest.mark.parametrize("through", ["loader", "accelerate"])
@pytest.mark.parametrize("shift", [0.2, None])
def test_a_model_sampling_that_was_set_in_the_model_itself(
    shift, through, comfy, remote, local, files, xsample, conditioning, ksample, latent, relative_error
):
    from xditd.client.comfyui.accelerate import accelerate

    stock = comfy.comfy.sd.load_diffusion_model(str(files.transformer))
    model = remote if through == "loader" else stock
    for each in (stock, remote):
        if shift is not None:
            each.model.model_sampling.set_parameters(shift=shift)
        else:
            patched = node("model_advanced", "ModelSamplingAuraFlow", 3.0)(comfy, each)
            each.model.model_sampling = patched.object_patches["model_sampling"]
    given = (conditioning(1), conditioning(2))
    expected = ksample(stock, *given, dict(latent))
    assert relative_error(expected, ksample(local, *given, dict(latent))) > EFFECT
    samples, _, note = xsample(model if through == "loader" else accelerate(model))
    assert note.startswith("fused" if shift is not None else "step by step")
    assert relative_error(samples, expected) <= TOLERANCE


def test_torch_compile_is_left_out_with_a_word(
    comfy, remote, local, xsample, conditioning, ksample, latent, relative_error, caplog
):
    compiled = node("torch_compile", "TorchCompileModel", "inductor")(comfy, remote)
    expected = ksample(local, conditioning(1), conditioning(2), dict(latent))
    actual = ksample(compiled, conditioning(1), conditioning(2), dict(latent))
    assert relative_error(actual, expected) <= TOLERANCE
    assert "TorchCompileModel" in caplog.text
    samples, _, note = xsample(compiled)
    assert note.startswith("fused")
    assert relative_error(samples, expected) <= TOLERANCE


def plain(comfy: Any, given: list[Any]) -> list[Any]:
    return given


def without_pooled(comfy: Any, given: list[Any]) -> list[Any]:
    return [[given[0][0], {}]]


def wide_pooled(comfy: Any, given: list[Any]) -> list[Any]:
    return [[given[0][0], {"pooled_output": torch.cat([given[0][1]["pooled_output"]] * 2, dim=1)}]]


def area(comfy: Any, given: list[Any]) -> list[Any]:
    return comfy.nodes.ConditioningSetArea().append(given, 64, 128, 64, 0, 0.7)[0]


def masked(comfy: Any, given: list[Any]) -> list[Any]:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1.0
    part = comfy.nodes.ConditioningSetMask().append(given, mask, "default", 1.0)[0]
    other = [[0.5 * given[0][0], given[0][1]]]
    return [*part, *other]


def ranged(comfy: Any, given: list[Any]) -> list[Any]:
    first = comfy.nodes.ConditioningSetTimestepRange().set_range(given, 0.0, 0.5)[0]
    second = comfy.nodes.ConditioningSetTimestepRange().set_range([[0.5 * given[0][0], given[0][1]]], 0.5, 1.0)[0]
    return [*first, *second]


def guided(scale: float) -> Callable[[Any, list[Any]], list[Any]]:
    return lambda _, given: [[given[0][0], {**given[0][1], "guidance": scale}]]


CONDITIONS = {
    "a guidance below zero": (guided(-3.0), plain, "guidance -3 is not from 0 to 1000", {}),
    "a guidance above all others": (guided(5000.0), plain, "guidance 5000 is not from 0 to 1000", {}),
    "no pooled state": (without_pooled, plain, "fused", {}),
    "a pooled state that is too wide": (wide_pooled, plain, "fused", {}),
    "no pooled state, cfg": (without_pooled, without_pooled, "cfg 2", {"cfg": 2.0}),
    "an area": (area, plain, "area", {}),
    "an area in the negative": (plain, area, "area", {}),
    "a mask": (masked, plain, "2 parts", {}),
    "two times": (ranged, plain, "2 parts", {}),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditioning(name, comfy, remote, local, xsample, conditioning, ksample, latent, relative_error):
    change, change_negative, said, more = CONDITIONS[name]
    positive, negative = change(comfy, conditioning(1)), change_negative(comfy, conditioning(2))
    expected = ksample(local, positive, negative, dict(latent), **more)
    samples, _, note = xsample(remote, positive=positive, negative=negative, **more)
    assert said in note
    assert relative_error(samples, expected) <= TOLERANCE
    same = ksample(local, conditioning(1), conditioning(2), dict(latent), **more)
    assert relative_error(expected, same) > EFFECT or name in ("a pooled state that is too wide",)


LATENTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "more rows than a request takes": ({"samples": torch.zeros(66, 16, 4, 4)}, {"steps": 1}, "66"),
    "rows of another batch": ({"samples": torch.zeros(2, 16, 8, 8), "batch_index": [3, 1]}, {"steps": 2}, "fused"),
    "an odd side": ({"samples": torch.zeros(1, 16, 9, 8)}, {"steps": 2}, "multiples of 16"),
    "no denoising": ({"samples": torch.ones(1, 16, 8, 8)}, {"denoise": 0.0}, "schedule"),
    "a part of the way": ({"samples": torch.ones(1, 16, 8, 8)}, {"denoise": 0.3, "steps": 2}, "fused"),
    "a mask that is none": ({"samples": torch.zeros(1, 16, 8, 8), "noise_mask": None}, {"steps": 2}, "fused"),
}


@pytest.mark.parametrize("name", LATENTS)
def test_latents(name, remote, local, xsample, conditioning, ksample, relative_error):
    latent, more, said = LATENTS[name]
    expected = ksample(local, conditioning(1), conditioning(2), dict(latent), **more)
    samples, _, note = xsample(remote, latent_image=dict(latent), **more)
    assert said in note
    assert relative_error(samples, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", ["BasicGuider", "CFGGuider", "DualCFGGuider", "PerpNegGuider"])
def test_guiders(kind, comfy, remote, local, conditioning, relative_error):
    from comfy_extras.nodes_perpneg import PerpNegGuider

    def run(model: Any) -> torch.Tensor:
        one, two, three = (conditioning(seed) for seed in (1, 2, 3))
        guider = {
            "BasicGuider": lambda: comfy.custom.BasicGuider.execute(model, one),
            "CFGGuider": lambda: comfy.custom.CFGGuider.execute(model, one, two, 2.5),
            "DualCFGGuider": lambda: comfy.custom.DualCFGGuider.execute(model, one, two, three, 2.5, 1.5, "regular"),
            "PerpNegGuider": lambda: PerpNegGuider.execute(model, one, two, three, 2.5, 0.8),
        }[kind]().result[0]
        sigmas = comfy.custom.BasicScheduler.execute(model, "simple", 3, 0.7).result[0]
        sampler = comfy.custom.KSamplerSelect.execute("euler").result[0]
        noise = comfy.custom.RandomNoise.execute(7).result[0]
        latent = {"samples": torch.ones(1, 16, 8, 8), "noise_mask": torch.linspace(0, 1, 64).expand(1, 64, 64)}
        return comfy.custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).result[0]["samples"]

    assert relative_error(run(remote), run(local)) <= TOLERANCE
