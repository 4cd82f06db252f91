"""The files of ControlNets for FLUX.1: configuration, key map element by element, and every refusal by name."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
import torch
from flux1_controlnets import MODES, comfyui_state, diffusers_state

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.gpu_workers.families.flux1.controlnet_checkpoint import Flux1ControlNet
from xditd.gpu_workers.families.flux1.controlnet_config import Flux1ControlNetConfig
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import resolve
from xditd.ipc.errors import BadCheckpoint, RequestError, Unsupported

State = dict[str, torch.Tensor]
Describe = Callable[[State], dict[str, TensorInfo]]


@pytest.mark.parametrize("modes", [0, MODES])
@pytest.mark.parametrize(("double", "single"), [(2, 2), (3, 0), (1, 2)])
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("is_original", [True, False])
def test_every_layout_is_read_from_shapes(
    describe: Describe, modes: int, double: int, single: int, guidance: bool, is_original: bool
) -> None:
    state = comfyui_state(1, modes=modes, double_blocks=double, single_blocks=single, guidance=guidance)
    infos = describe(state if is_original else diffusers_state(state))
    family = detect(infos)
    assert (family.name, family.kind) == ("flux1_controlnet", "controlnet")
    config = resolve(family, infos).config
    assert config == Flux1ControlNetConfig(256, double, single, 4096, 768, guidance, modes, is_original)


@pytest.mark.parametrize("norm_suffix", ["scale", "weight"])
def test_both_layouts_give_every_parameter_the_same_values(
    cache: ModelCache, describe: Describe, norm_suffix: str
) -> None:
    original = comfyui_state(1, modes=MODES)
    expected = diffusers_state(original)
    spelled = {
        name.removesuffix("scale") + norm_suffix if name.endswith("_norm.scale") else name: each
        for name, each in original.items()
    }
    for state in (spelled, expected):
        match = cache.match(describe(state))
        bindings = match.bind(state)
        assert bindings.keys() == expected.keys()
        for name, bound in bindings.items():
            assert isinstance(bound, torch.Tensor)
            assert torch.equal(bound, expected[name]), name
            assert bound.untyped_storage().data_ptr() in {each.untyped_storage().data_ptr() for each in state.values()}


def test_the_released_union_pro_has_the_tensors_of_the_class() -> None:
    from diffusers import FluxControlNetModel

    family = Flux1ControlNet()
    config = Flux1ControlNetConfig(3072, 5, 10, 4096, 768, True, 10)
    with torch.device("meta"):
        state = {entry.source: torch.empty(entry.shape) for entry in family.entries(config, ())}
    assert family.configure({name: tuple(each.shape) for name, each in state.items()}) == config
    with torch.device("meta"):
        model = FluxControlNetModel(num_layers=5, num_single_layers=10, guidance_embeds=True, num_mode=10)
    assert {name: each.shape for name, each in state.items()} == {n: p.shape for n, p in model.named_parameters()}


def _without(name: str) -> Callable[[State], State]:
    return lambda state: {each: tensor for each, tensor in state.items() if each != name}


def _with(**tensors: tuple[int, ...]) -> Callable[[State], State]:
    made = {name.replace("__", "."): torch.zeros(shape) for name, shape in tensors.items()}
    return lambda state: {**state, **made}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_without("controlnet_blocks.1.weight"), BadCheckpoint, r"1 missing: controlnet_blocks.1.weight"),
        (_without("controlnet_x_embedder.bias"), BadCheckpoint, r"1 missing: controlnet_x_embedder.bias"),
        (
            _without("transformer_blocks.0.attn.to_q.weight"),
            BadCheckpoint,
            r"1 missing: transformer_blocks.0.attn.to_q",
        ),
        (_with(proj_out__weight=(64, 256)), BadCheckpoint, r"1 unexpected: proj_out.weight"),
        (_with(context_embedder__weight=(128, 4096)), BadCheckpoint, r"context_embedder.weight is \[128, 4096\]"),
        (_with(input_hint_block__conv_in__weight=(16, 3, 3, 3)), Unsupported, r"XLabs' ControlNet reads pixels"),
        (_with(controlnet_x_embedder__weight=(256, 68)), Unsupported, r"68 channels, those with a mask \(inpainting\)"),
        (_with(controlnet_x_embedder__weight=(256, 32)), Unsupported, r"32 channels, those of another picture"),
    ],
    ids=[
        "a weight of a residual is missing",
        "a bias is missing",
        "a projection is missing",
        "one too many",
        "another shape",
        "XLabs'",
        "with a mask",
        "another picture",
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(
    cache: ModelCache, describe: Describe, change: Callable[[State], State], error: type[RequestError], message: str
) -> None:
    with pytest.raises(error, match=message):
        cache.match(describe(change(diffusers_state(comfyui_state(1, modes=MODES)))))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"input_hint_block.0.weight": (16, 3, 3, 3)}, "XLabs' ControlNet"),
        ({"controlnet_blocks.0.linear.weight": (256, 256)}, "MistoLine's ControlNet"),
    ],
    ids=str,
)
def test_other_controlnets_for_flux_are_refused_by_name(
    cache: ModelCache, describe: Describe, extra: dict[str, tuple[int, ...]], message: str
) -> None:
    state = {**comfyui_state(1), **{name: torch.zeros(shape) for name, shape in extra.items()}}
    with pytest.raises(Unsupported, match=message):
        cache.match(describe(state))


@pytest.mark.parametrize(
    "names",
    [
        ["controlnet_blocks.0.weight", "controlnet_x_embedder.weight", "transformer_blocks.0.img_mod.1.weight"],
        ["controlnet_blocks.0.weight", "pos_embed_input.proj.weight", "transformer_blocks.0.ff.net.0.proj.weight"],
        list(flux1_state_dict(0, double_blocks=1, single_blocks=1)),
    ],
    ids=["Qwen-Image's", "SD3's", "FLUX.1 itself"],
)
def test_others_are_not_claimed(names: Collection[str]) -> None:
    assert not Flux1ControlNet().claims(names)
