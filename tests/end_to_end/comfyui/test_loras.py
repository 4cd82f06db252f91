"""LoRAs of stock nodes on xDiT MODELs and CLIPs are branches: results of stock, no byte of the base copied."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from lora_files import matrices
from safetensors.torch import load_file

from xditd.ipc.tensors import ComponentKind

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

BAR = 1e-6
STEPS = 2


@pytest.fixture(scope="module")
def folder(comfy, tmp_path_factory) -> Iterator[Path]:
    """A folder in which stock LoRA loaders find files."""
    import folder_paths

    made = tmp_path_factory.mktemp("loras")
    before = folder_paths.get_folder_paths("loras")[:]
    folder_paths.add_model_folder_path("loras", str(made))
    yield made
    folder_paths.folder_names_and_paths["loras"][0][:] = before


@pytest.fixture(scope="module")
def loras(comfy, local, folder, files) -> dict[str, str]:
    """LoRAs of all linear layers, by the program that wrote them; values are file names."""
    state = load_file(files.transformer)
    of_class = {}
    for name, where in comfy.comfy.utils.flux_to_diffusers(local.model.model_config.unet_config).items():
        key, offset = (where, None) if isinstance(where, str) else where[:2]
        if name.endswith(".weight") and key in state and state[key].ndim == 2:
            rows, columns = state[key].shape
            of_class[name.removesuffix(".weight")] = (offset[2] if offset else rows, columns)
    made = {
        "kohya": lora_files.make(matrices(state), "kohya", 1),
        "comfyui": lora_files.make(matrices(state), "comfyui", 2, ranks=(3, 8), dtype=torch.bfloat16),
        "diffusers": lora_files.make(of_class, "diffusers", 3),
        "onetrainer": lora_files.make(of_class, "onetrainer", 4),
    }
    for name, lora in made.items():
        lora.save(folder / f"{name}.safetensors")
    return {name: f"{name}.safetensors" for name in made}


@pytest.fixture
def run(conditioning, ksample, latent) -> Callable[[Any], torch.Tensor]:
    return lambda model: ksample(model, conditioning(1), conditioning(2), dict(latent), steps=STEPS)


@pytest.fixture
def load(comfy, loras) -> Callable[..., Any]:
    """Run LoraLoaderModelOnly; each call has a node of its own, as two nodes of a workflow."""
    return lambda model, name, strength: comfy.nodes.LoraLoaderModelOnly().load_lora_model_only(
        model, loras[name], strength
    )[0]


@pytest.fixture
def bypass(comfy, loras) -> Callable[..., Any]:
    from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly

    return lambda model, name, strength: LoraLoaderBypassModelOnly().load_lora_model_only(model, loras[name], strength)[
        0
    ]


@pytest.fixture
def lent(daemon) -> Callable[[ComponentKind], list[Any]]:
    """The lent components of a kind."""
    return lambda kind: [each for each in daemon.status().components if each.kind == kind]


def accelerated(model: Any) -> Any:
    from xditd.client.comfyui.accelerate import accelerate

    return accelerate(model)


@pytest.mark.parametrize("through", ["loader", "accelerate"])
@pytest.mark.parametrize("name", ["kohya", "comfyui", "diffusers", "onetrainer"])
def test_a_file_of_each_program(name, through, remote, local, load, run, lent, relative_error):
    expected = run(load(local, name, 0.8))
    assert relative_error(expected, run(local)) > 1e-2
    model = load(remote, name, 0.8) if through == "loader" else accelerated(load(local, name, 0.8))
    assert relative_error(run(model), expected) <= BAR
    assert len(lent(ComponentKind.LORA)) == 1
    assert not model.weights._merged, "every layer is a branch"


def stacked(load, model):
    return load(load(load(model, "kohya", 0.6), "diffusers", -0.7), "comfyui", 0.0)  # 0 loads nothing


def twice(load, model):
    return load(load(model, "kohya", 0.5), "kohya", 0.25)


def twice_alike(load, model):
    return load(load(model, "onetrainer", 0.5), "onetrainer", 0.5)


@pytest.mark.parametrize("change", [stacked, twice, twice_alike], ids=lambda each: each.__name__)
def test_several(change, remote, local, load, run, lent, relative_error):
    expected = run(change(load, local))
    assert relative_error(run(change(load, remote)), expected) <= BAR
    assert len(lent(ComponentKind.LORA)) == (2 if change is stacked else 1)


def test_a_strength_of_zero(comfy, remote, local, loras, run, relative_error):
    """As LoraLoader leaves it on the MODEL when the CLIP has another strength."""
    import folder_paths

    found = []
    for model in (remote, local):
        lora = comfy.comfy.utils.load_torch_file(str(folder_paths.get_full_path("loras", loras["kohya"])))
        found.append(run(comfy.comfy.sd.load_lora_for_models(model, None, lora, 0.0, 0.0)[0]))
    assert relative_error(found[0], found[1]) <= BAR
    assert torch.equal(found[0], run(remote))


def test_what_is_no_lora_is_merged_beside_branches(comfy, remote, local, load, run, relative_error):
    """DoRA, LoHa, differences, biases and a scaled weight, and a LoRA on the same and on other weights."""
    generator = torch.Generator().manual_seed(9)

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    image = "diffusion_model.img_in"
    dora = {f"{image}.lora_up.weight": random(256, 4), f"{image}.lora_down.weight": random(4, 64)}
    dora[f"{image}.dora_scale"] = random(256, 1).abs() + 1.0
    shapes = {"hada_w1_a": (256, 2), "hada_w1_b": (2, 256), "hada_w2_a": (256, 2), "hada_w2_b": (2, 256)}
    loha = {f"diffusion_model.double_blocks.0.img_attn.proj.{name}": random(*shape) for name, shape in shapes.items()}
    others = {"diffusion_model.double_blocks.1.img_mod.lin.diff": random(1536, 256)}
    others["diffusion_model.double_blocks.1.img_mod.lin.diff_b"] = random(1536)
    scaled = {"diffusion_model.single_blocks.0.linear2.weight": ("diff", (random(256, 1280),))}

    def changed(model: Any) -> Any:
        model = load(model, "kohya", 0.5)
        for each in (dora, loha, others):
            (model, _) = comfy.comfy.sd.load_lora_for_models(model, None, each, 0.8, 0.0)
        model.add_patches(scaled, 0.3, 0.9)
        return model

    ours = changed(remote)
    assert relative_error(run(ours), run(changed(local))) <= 2 * BAR
    assert sorted(ours.weights._merged) == [
        "double_blocks.0.img_attn.proj.weight",
        "double_blocks.1.img_mod.lin.bias",
        "double_blocks.1.img_mod.lin.weight",
        "img_in.weight",
        "single_blocks.0.linear2.weight",
    ]


def other_adapters() -> dict[str, dict[str, torch.Tensor]]:
    """Adapters that are no product of two factors, by kind, each as its file has it, of a layer of 256 x 256."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    alpha = {"alpha": torch.tensor(4.0)}
    pair = {"lora_up.weight": random(256, 4), "lora_down.weight": random(4, 256)}
    return {
        "LoHa": alpha | {f"hada_w{n}_{end}": random(*shape) for n in "12" for end, shape in HADA.items()},
        "LoKr": {"lokr_w1": random(16, 16), "lokr_w2": random(16, 16)},
        "LoKr in factors": alpha | {"lokr_w1": random(8, 8), "lokr_w2_a": random(32, 4), "lokr_w2_b": random(4, 32)},
        "DoRA": pair | {"dora_scale": random(256, 1).abs() + 1.0},
        "GLoRA": {f"{name}.weight": random(*GLORA[name]) for name in GLORA},
        "OFT": alpha | {"oft_blocks": random(8, 32, 32)},
        "OFT that rescales": {"oft_blocks": random(8, 32, 32), "rescale": random(8, 1, 1) + 1.0},
        "BOFT": alpha | {"oft_blocks": random(2, 32, 8, 8)},
        "difference": {"diff": random(256, 256), "diff_b": random(256)},
    }


HADA = {"a": (256, 4), "b": (4, 256)}
GLORA = {"a1": (4, 256), "a2": (256, 4), "b1": (4, 256), "b2": (256, 4)}


@pytest.mark.parametrize("kind", other_adapters())
def test_other_adapters_are_baked_as_in_stock(kind, comfy, daemon, remote, local, run, relative_error):
    """The layer has the numbers of stock's ``calculate_weight``, and is the only one that is written."""
    layer = "double_blocks.1.img_attn.proj"
    adapter = {f"diffusion_model.{layer}.{name}": tensor for name, tensor in other_adapters()[kind].items()}
    ours, theirs = (comfy.comfy.sd.load_lora_for_models(each, None, adapter, 0.7, 0.0)[0] for each in (remote, local))
    assert relative_error(run(ours), run(theirs)) <= BAR
    names = [f"{layer}.weight", f"{layer}.bias"] if kind == "difference" else [f"{layer}.weight"]
    assert sorted(ours.weights._merged) == sorted(names)
    for name in names:
        base, key = ours.weights.base[name], f"diffusion_model.{name}"
        stock = comfy.comfy.lora.calculate_weight(theirs.patches[key], base.clone(), key)
        assert relative_error(ours.weights._arena.tensors[name], stock) <= BAR
        assert relative_error(stock, base) > 1e-3
    assert ours.weights._arena.tensors.keys() == set(names)


@pytest.mark.parametrize("through", ["loader", "accelerate"])
def test_bypass(through, remote, local, bypass, load, run, relative_error):
    """The second bypass node replaces the first, as in ComfyUI, which also leaves out parts of fused layers."""

    def changed(model: Any) -> Any:
        return bypass(bypass(load(model, "comfyui", 0.5), "diffusers", 0.9), "kohya", -0.4)

    expected = run(changed(local.clone()))
    model = changed(remote) if through == "loader" else accelerated(changed(local))
    assert relative_error(run(model), expected) <= BAR
    model = bypass(remote, "diffusers", 0.9)
    assert relative_error(run(model), run(bypass(local, "diffusers", 0.9))) <= BAR


@pytest.mark.parametrize("through", ["loader", "accelerate"])
def test_hooks_and_their_keyframes(
    through, comfy, daemon, remote, local, loras, load, conditioning, ksample, latent, relative_error
):
    """Two conditionings with their own LoRAs, one with strengths by step, on a MODEL that has one, too."""
    from comfy_extras import nodes_hooks

    def hooks(name: str, strength: float, *keyframes: tuple[float, float]) -> Any:
        (made,) = nodes_hooks.CreateHookLora().create_hook(loras[name], strength, 0.0)
        frames = None
        for strength_mult, start in keyframes:
            (frames,) = nodes_hooks.CreateHookKeyframe().create_hook_keyframe(strength_mult, start, frames)
        return nodes_hooks.SetHookKeyframes().set_hook_keyframes(made, frames)[0] if keyframes else made

    def run(model: Any, *, with_keyframes: bool = True) -> torch.Tensor:
        frames = ((1.0, 0.0), (-0.5, 0.4), (0.0, 0.8)) if with_keyframes else ()
        positive = [[states, {**more, "hooks": hooks("kohya", 0.6, *frames)}] for states, more in conditioning(1)]
        negative = [[states, {**more, "hooks": hooks("onetrainer", -0.4)}] for states, more in conditioning(2)]
        return ksample(load(model, "comfyui", 0.5), positive, negative, dict(latent), steps=4, cfg=2.0)

    ours = remote if through == "loader" else accelerated(local)
    expected = run(local)
    assert relative_error(run(local, with_keyframes=False), expected) > 1e-2
    assert relative_error(run(ours), expected) <= 2 * BAR
    assert [each.generation for each in daemon.status().components] == [0, 0, 0, 0]
    plain = ksample(local, conditioning(1), conditioning(2), dict(latent), steps=4, cfg=2.0)
    assert (
        relative_error(ksample(ours, conditioning(1), conditioning(2), dict(latent), steps=4, cfg=2.0), plain)
        <= 2 * BAR
    )


def test_a_change_of_strength_and_a_switch_copy_nothing(daemon, remote, local, comfy, loras, run, relative_error):
    first, second = comfy.nodes.LoraLoaderModelOnly(), comfy.nodes.LoraLoaderModelOnly()

    def changed(model: Any, one: float, other: float) -> Any:
        (model,) = first.load_lora_model_only(model, loras["kohya"], one) if one else (model,)
        return second.load_lora_model_only(model, loras["onetrainer"], other)[0] if other else model

    held = changed(remote, 0.8, 0.3)
    run(held)
    before = daemon.status()
    for strengths in ((0.4, 0.3), (-0.4, 1.0), (0.8, 0.0), (0.0, 0.0), (0.0, 0.6), (0.4, 0.3)):
        assert relative_error(run(changed(remote, *strengths)), run(changed(local, *strengths))) <= BAR
    after = daemon.status()
    assert {each.component_id for each in after.components} == {each.component_id for each in before.components}
    assert [each.copied for each in after.components] == [each.copied for each in before.components]
    assert [each.generation for each in after.components] == [0, 0, 0]
    assert after.counters.plugs == before.counters.plugs
    assert after.loras.switches > before.loras.switches
    assert after.loras.bound == before.loras.bound
    assert held


def test_a_lora_goes_with_its_last_model_and_with_the_base(comfy, remote, load, run, lent):
    first = load(remote, "kohya", 0.8)
    run(first)
    run(load(remote, "diffusers", 0.8))
    assert len(lent(ComponentKind.LORA)) == 2
    del first
    gc.collect()
    run(remote)
    assert len(lent(ComponentKind.LORA)) == 0
    run(load(remote, "kohya", 0.8))
    assert len(lent(ComponentKind.LORA)) == 1
    comfy.comfy.model_management.unload_all_models()
    assert not lent(ComponentKind.LORA)
    assert not lent(ComponentKind.TRANSFORMER)
