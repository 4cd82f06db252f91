"""Changes that the workers cannot run are refused by name before the first step, and nothing is lent."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import comfyui_families
import pytest
import torch

from xditd.client import BadRequest, Client, Unsupported
from xditd.client.demo import checkpoints

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

Change = Callable[[Any], None]


def node(module: str, name: str, *args: Any) -> Callable[[Any], Any]:
    """Return a function that runs a stock node from MODEL to MODEL."""

    def apply(model: Any) -> Any:
        import importlib

        found = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
        if hasattr(found, "execute"):
            return found.execute(model, *args).result[0]
        made = found()
        return getattr(made, made.FUNCTION)(model, *args)[0]

    return apply


NODES = {
    "SkipLayerGuidanceDiT from 30 %": (
        node("slg", "SkipLayerGuidanceDiT", 3.0, 0.3, 0.9, "0", "0"), r"other blocks \(SkipLayerGuidanceDiT",
    ),
    "SkipLayerGuidanceDiTSimple": (
        node("slg", "SkipLayerGuidanceDiTSimple", 0.3, 0.9, "0", "0"), r"other blocks \(SkipLayerGuidanceDiTSimple",
    ),
    "PerturbedAttentionGuidance": (node("pag", "PerturbedAttentionGuidance", 3.0), "PerturbedAttentionGuidance"),
    "SelfAttentionGuidance": (node("sag", "SelfAttentionGuidance", 0.5, 2.0), "SelfAttentionGuidance"),
    "NAGuidance": (node("nag", "NAGuidance", 5.0, 0.5, 1.5), "NAGuidance"),
    "TomePatchModel": (node("tomesd", "TomePatchModel", 0.3), "TomePatchModel"),
    "FluxKVCache": (node("flux", "FluxKVCache"), "KV_Attn_Input"),
    "ScaleROPE": (node("rope", "ScaleROPE", 2.0, 0.0, 1.0, 0.0, 1.0, 0.0), "RoPE"),
    "ModelComputeDtype": (node("model_advanced", "ModelComputeDtype", "bf16"), "manual_cast_dtype"),
    "ModelSamplingSD3": (node("model_advanced", "ModelSamplingSD3", 3.0), "ModelSamplingSD3.*timesteps up to 1000"),
    "ModelAttentionBackend": (node("model_advanced", "ModelAttentionBackend", "pytorch attention"), "attention"),
}  # fmt: skip


@pytest.fixture
def refused(comfy, connected, daemon, conditioning, ksample, latent, monkeypatch) -> Callable[..., None]:
    """Sample, and check that it is refused before any forward and any loan."""

    def check(make: Callable[[], Any], said: str, positive: Any = None, **more: Any) -> None:
        forwards: list[Any] = []
        monkeypatch.setattr(Client, "call_parts", lambda *_, **__: forwards.append(1))
        comfy.comfy.model_management.unload_all_models()
        with pytest.raises(Unsupported, match=said):
            ksample(make(), positive or conditioning(1), conditioning(2), dict(latent), **{"steps": 10, **more})
        assert not forwards
        assert not daemon.status().components

    return check


@pytest.mark.parametrize("through", ["loader", "accelerate, then node", "node, then accelerate"])
@pytest.mark.parametrize("name", NODES)
def test_a_node(name, through, remote, local, refused):
    from xditd.client.comfyui.accelerate import accelerate

    change, said = NODES[name]
    make = {
        "loader": lambda: change(remote),
        "accelerate, then node": lambda: change(accelerate(local)),
        "node, then accelerate": lambda: accelerate(change(local)),
    }[through]
    refused(make, said)


def test_an_adapter_that_bypasses_the_weights_and_is_no_lora(comfy, remote, local, refused):
    from xditd.client.comfyui.accelerate import accelerate

    shapes = {"hada_w1_a": (256, 4), "hada_w1_b": (4, 64), "hada_w2_a": (256, 4), "hada_w2_b": (4, 64)}
    adapters = {f"diffusion_model.img_in.{name}": torch.ones(shape) for name, shape in shapes.items()}

    def bypass(model: Any) -> Any:
        return comfy.comfy.sd.load_bypass_lora_for_models(model, None, adapters, 1.0, 0.0)[0]

    refused(lambda: bypass(remote), "bypass_lora.*LoraLoaderBypass")
    refused(lambda: accelerate(bypass(local)), "bypass_lora.*LoraLoaderBypass")


class Controlled:
    """The methods of a control net that ControlNetApplyAdvanced calls."""

    def __new__(cls) -> Any:
        from comfy.controlnet import ControlBase

        made = ControlBase()
        made.copy = lambda: made
        return made


def test_a_control_net_from_60_percent(comfy, remote, refused, conditioning):
    apply = comfy.nodes.ControlNetApplyAdvanced().apply_controlnet
    hint = torch.zeros(1, 128, 128, 3)
    positive, _ = apply(conditioning(1), conditioning(2), Controlled(), hint, 1.0, 0.6, 1.0)
    refused(lambda: remote, "ControlNet", positive)


def test_conditioning_that_changes_the_model(remote, refused, conditioning, latent):
    from comfy.hooks import HookGroup, TransformerOptionsHook, create_hook_lora

    def attached(**more: Any) -> list[Any]:
        ((embeds, extras),) = conditioning(1)
        return [[embeds, {**extras, **more}]]

    apart = {"reference_latents": [latent["samples"]], "reference_latents_method": "index_timestep_zero"}
    refused(lambda: remote, "index_timestep_zero", attached(**apart))
    mask = {"attention_mask": torch.ones(1, 80, 80), "attention_mask_img_shape": (8, 8)}
    refused(lambda: remote, "Apply Style Model", attached(**mask))
    refused(lambda: remote, "GLIGEN", attached(gligen=("position", types.SimpleNamespace(model=None), [])))
    hooks = create_hook_lora({"diffusion_model.img_in.diff": torch.ones(256, 64)}, 1.0, 0.0)
    refused(lambda: remote.clone(), "hooks that change weights by what is no LoRA", attached(hooks=hooks))
    hooks = HookGroup()
    hooks.add(TransformerOptionsHook({"wrappers": {}}))
    refused(lambda: remote.clone(), "hooks of the kind 'transformer_options'", attached(hooks=hooks))


PLANTS: dict[str, tuple[Callable[[Any], Any], str]] = {}


OTHER_LATENTS = {
    "channels": (
        (1, 4, 16, 16),
        r"has 4 channels, and .* have 16 \(its shape is \[1, 4, 16, 16\]\); make it",
    ),
    "frames": ((1, 16, 1, 16, 16), "has 5 dimensions, and this model's have 4"),
    "no rows": ((0, 16, 16, 16), "is empty"),
    "no columns": ((1, 16, 16, 0), "is empty"),
}


@pytest.mark.parametrize("what", OTHER_LATENTS)
def test_latents_of_another_model(what, comfy, remote, conditioning, ksample, xsample, daemon):
    shape, said = OTHER_LATENTS[what]
    given = {"samples": torch.ones(shape)}
    comfy.comfy.model_management.unload_all_models()
    with pytest.raises(BadRequest, match=rf"^XDiT: the latent {said}"):
        ksample(remote, conditioning(1), conditioning(2), dict(given), cfg=2.0)
    with pytest.raises(BadRequest, match=rf"^XDiT: the latent {said}"):
        xsample(remote, latent_image=dict(given))
    assert not daemon.status().components


@pytest.mark.parametrize("name", ["flux1_dev", "flux2_klein", "qwen_image", "wan_text", "wan_vace", "z_image"])
def test_texts_of_another_model(name, comfy, weightless, ksample, daemon):
    variant = comfyui_families.VARIANTS[name]
    ((embeds, extras),) = variant.text(2)
    wide = [[torch.cat([embeds, embeds[..., :8]], dim=2), extras]]
    channels = variant.text_channels
    model = weightless(name)
    with pytest.raises(
        BadRequest, match=rf"^XDiT: the negative conditioning has .* {channels + 8} channels.* reads {channels}; encode"
    ):
        ksample(model, variant.text(1), wide, variant.latent(), cfg=2.0)
    assert not daemon.status().components
    assert ksample(model, variant.text(1), wide, variant.latent()).std() > 0  # which stock does not read at cfg 1


def plant(said: str) -> Callable[[Change], Change]:
    """Register an unknown change, and the message of its refusal."""

    def register(change: Change) -> Change:
        def apply(model: Any) -> Any:
            patched = model.clone()
            change(patched)
            return patched

        PLANTS[change.__name__] = (apply, said)
        return change

    return register


@plant("an_option")
def a_model_option(patcher: Any) -> None:
    patcher.model_options["an_option"] = print


@plant("an_option")
def a_transformer_option(patcher: Any) -> None:
    patcher.model_options["transformer_options"]["an_option"] = print


@plant("double_block: a_block_patch")
def a_block_patch(patcher: Any) -> None:
    patcher.set_model_double_block_patch(a_block_patch)


@plant("diffusion_model.forward_orig.*an_object_patch")
def an_object_patch_of_forward_orig(patcher: Any) -> None:
    patcher.add_object_patch("diffusion_model.forward_orig", lambda *_: None)


@plant(r"object patch diffusion_model \(")
def an_object_patch_of_the_model(patcher: Any) -> None:
    patcher.add_object_patch("diffusion_model", torch.nn.Identity())


@plant("latent_format")
def an_object_patch_of_another_part(patcher: Any) -> None:
    patcher.add_object_patch("latent_format", copy.copy(patcher.model.latent_format))


@plant("of the kind 'a_kind'")
def a_wrapper(patcher: Any) -> None:
    patcher.add_wrapper_with_key("a_kind", "pack", print)


@plant("of the kind 'a_kind'")
def a_callback(patcher: Any) -> None:
    patcher.add_callback_with_key("a_kind", "pack", print)


@plant("pack injects")
def an_injection(patcher: Any) -> None:
    from comfy.patcher_extension import PatcherInjection

    patcher.set_injections("pack", [PatcherInjection(print, print)])


@plant("weight wrappers")
def a_weight_wrapper(patcher: Any) -> None:
    patcher.add_weight_wrapper("diffusion_model.img_in.weight", print)


@plant("hooks that change weights by what is no LoRA")
def a_weight_hook(patcher: Any) -> None:
    difference = (1.0, ("diff", (torch.ones(256, 64),)), 1.0, None, None)
    patcher.hook_patches["ref"] = {"diffusion_model.img_in.weight": [difference]}


@plant("several GPUs")
def a_multigpu_clone(patcher: Any) -> None:
    patcher.additional_models["multigpu"] = [patcher]


@plant("an_attribute of the patcher")
def an_attribute(patcher: Any) -> None:
    patcher.an_attribute = print


@plant("apply_hooks of the patcher")
def a_method(patcher: Any) -> None:
    patcher.apply_hooks = lambda *_, **__: {}


LASTING: dict[str, tuple[Callable[[Any], Callable[[], None]], str]] = {}
"""Changes of the modules, which all clones share; each returns a function that undoes it."""


def lasting(said: str) -> Callable[[Any], Any]:
    def register(change: Any) -> Any:
        LASTING[change.__name__] = (change, said)
        return change

    return register


def swapped(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute; returns a function that restores it."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    return lambda: delattr(owner, name) if before is missing else setattr(owner, name, before)


@lasting(r"img_in has a forward hook \(a_forward_hook")
def a_forward_hook(model: Any) -> Callable[[], None]:
    def hook(*_: Any) -> None: ...

    hook.__qualname__ = "a_forward_hook"
    remove: Callable[[], None] = model.diffusion_model.img_in.register_forward_hook(hook).remove
    return remove


@lasting("single_blocks.0 has a forward hook")
def a_forward_pre_hook(model: Any) -> Callable[[], None]:
    remove: Callable[[], None] = model.diffusion_model.single_blocks[0].register_forward_pre_hook(print).remove
    return remove


@lasting("diffusion_model.forward_orig was replaced")
def a_method_of_the_transformer(model: Any) -> Callable[[], None]:
    return swapped(model.diffusion_model, "forward_orig", print)


@lasting("apply_model was replaced")
def a_method_of_the_model(model: Any) -> Callable[[], None]:
    return swapped(model, "apply_model", print)


@lasting(r"double_blocks.0.img_attn.forward was replaced")
def a_method_of_a_block(model: Any) -> Callable[[], None]:
    return swapped(model.diffusion_model.double_blocks[0].img_attn, "forward", print)


@lasting("DoubleStreamBlock.forward is that of")
def a_method_of_a_class(model: Any) -> Callable[[], None]:
    def forward(*_: Any) -> None: ...

    return swapped(type(model.diffusion_model.double_blocks[0]), "forward", forward)


@lasting("double_blocks.1 was replaced by Identity")
def a_module(model: Any) -> Callable[[], None]:
    blocks, before = model.diffusion_model.double_blocks, model.diffusion_model.double_blocks[1]
    blocks[1] = torch.nn.Identity()
    return lambda: blocks.__setitem__(1, before)


@lasting("extra was added")
def another_module(model: Any) -> Callable[[], None]:
    model.diffusion_model.add_module("extra", torch.nn.Identity())
    return lambda: delattr(model.diffusion_model, "extra")


@lasting("num_heads was changed from 2 to 4")
def a_setting(model: Any) -> Callable[[], None]:
    return swapped(model.diffusion_model.double_blocks[0], "num_heads", 4)


@lasting("pe_embedder.axes_dim was changed from")
def a_list_of_settings(model: Any) -> Callable[[], None]:
    embedder = model.diffusion_model.pe_embedder
    return swapped(embedder, "axes_dim", embedder.axes_dim[::-1])


@lasting("params.guidance_embed was changed from")
def a_record_of_settings(model: Any) -> Callable[[], None]:
    return swapped(model.diffusion_model.params, "guidance_embed", None)


@lasting(r"img_in.weight_function was set \(print\)")
def a_function_of_weights(model: Any) -> Callable[[], None]:
    return swapped(model.diffusion_model.img_in, "weight_function", [print])


@lasting(r"all modules have a forward hook \(print\)")
def a_hook_on_all_modules(model: Any) -> Callable[[], None]:
    undo: Callable[[], None] = torch.nn.modules.module.register_module_forward_hook(print).remove
    return undo


@pytest.mark.parametrize("through", ["loader", "accelerate"])
@pytest.mark.parametrize("name", PLANTS)
def test_an_unknown_change_at_every_level(name, through, remote, local, refused):
    from xditd.client.comfyui.accelerate import accelerate

    change, said = PLANTS[name]
    refused((lambda: change(remote)) if through == "loader" else (lambda: accelerate(change(local))), said)


@pytest.mark.parametrize("through", ["loader", "accelerate"])
@pytest.mark.parametrize("name", LASTING)
def test_an_unknown_change_of_the_modules(name, through, comfy, remote, local, files, refused):
    from xditd.client.comfyui.accelerate import accelerate

    change, said = LASTING[name]
    model = remote if through == "loader" else comfy.comfy.sd.load_diffusion_model(str(files.transformer))
    undo = change(model.model)
    try:
        refused(lambda: model if through == "loader" else accelerate(model), said)
    finally:
        undo()


def test_a_change_within_a_step(remote, conditioning, ksample, latent):
    """As in TeaCache, a function around the model replaces a method of the transformer while it runs."""
    steps = []

    def around(apply_model: Any, given: dict[str, Any]) -> Any:
        steps.append(1)
        undo = swapped(remote.model.diffusion_model, "forward_orig", print) if len(steps) == 2 else lambda: None
        try:
            return apply_model(given["input"], given["timestep"], **given["c"])
        finally:
            undo()

    patched = remote.clone()
    patched.set_model_unet_function_wrapper(around)
    with pytest.raises(Unsupported, match="forward_orig was replaced"):
        ksample(patched, conditioning(1), conditioning(2), dict(latent))
    assert len(steps) == 2
    ksample(remote, conditioning(1), conditioning(2), dict(latent))


@pytest.mark.parametrize("through", ["loader", "accelerate"])
def test_other_input_channels_by_their_loader(through, comfy, connected, daemon, tmp_path):
    from safetensors.torch import save_file

    from xditd.client.comfyui.accelerate import accelerate
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    tensors = checkpoints.flux1_state_dict(1)
    tensors["img_in.weight"] = torch.zeros(256, 4 * 48)
    save_file(tensors, tmp_path / "fill.safetensors")
    path = str(tmp_path / "fill.safetensors")
    make = load_unet if through == "loader" else lambda _: accelerate(comfy.comfy.sd.load_diffusion_model(path))
    with pytest.raises(Unsupported, match=r"reads 48 channels.*96 \(Fill\)"):
        make(path)
    assert not daemon.status().components
