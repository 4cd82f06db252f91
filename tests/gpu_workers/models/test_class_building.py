"""Modules made from descriptions: changed ones come out the same or are refused by name; hostile states are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import diffusers
import msgspec
import pytest
import torch
from diffusers.models import attention_processor

from xditd.client.module_descriptions import describe_module
from xditd.gpu_workers.models.class_building import apply_state, check_versions, set_tensors
from xditd.gpu_workers.models.configured_classes import build_module
from xditd.ipc import module_state
from xditd.ipc.arguments import Argument, ListOf, MapOf, Named, PairsOf, SetOf, Values
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.module_state import ModuleState, SubmoduleState
from xditd.ipc.tensors import ModuleDescription


def make_unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def made_from(module: torch.nn.Module, **changes: Any) -> tuple[Any, str]:
    """Send a module's description, and build, change and fill what a worker makes of it; also how it differed."""
    described, tensors = describe_module(module, "unet")
    described = msgspec.structs.replace(described, **changes)
    built = build_module(described)
    state = module_state.decode(described.state)
    difference = apply_state(built, state)
    set_tensors(built, state, tensors)
    return built, difference


def run(module: Any) -> torch.Tensor:
    torch.manual_seed(1)
    sample, hidden = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    with torch.no_grad():
        result: torch.Tensor = module(sample, 1, hidden).sample
    return result


def inject_lora(unet: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), unet)
    unet.eval()


def share_blocks(unet: Any) -> None:
    unet.mid_block.resnets[1] = unet.mid_block.resnets[0]


def set_norm(unet: Any) -> None:
    unet.conv_norm_out.eps = 0.5


def remove_norm(unet: Any) -> None:
    unet.conv_norm_out = None


def remove_layer(unet: Any) -> None:
    del unet.down_blocks[0].resnets[0].dropout
    unet.down_blocks[0].resnets[0].dropout = torch.nn.Identity()


def set_ip_adapter(unet: Any) -> None:
    processor = attention_processor.IPAdapterAttnProcessor2_0(16, 8, num_tokens=(2,), scale=0.5)
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = processor.eval()


CHANGES: dict[str, Callable[[Any], None]] = {
    "LoRA layers of PEFT": inject_lora,
    "other processors": lambda unet: unet.set_attn_processor(attention_processor.AttnProcessor()),
    "an IP adapter": set_ip_adapter,
    "fused projections": lambda unet: unet.fuse_qkv_projections(),
    "FreeU": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "a norm's eps": set_norm,
    "no norm": remove_norm,
    "another layer": remove_layer,
    "shared blocks": share_blocks,
    "slices of attention": lambda unet: unet.set_attention_slice(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_module_is_made_with_its_change(name: str) -> None:
    unet = make_unet()
    original = run(unet)
    CHANGES[name](unet)
    built, difference = made_from(unet)
    assert difference
    if name == "an IP adapter":  # which needs images; the module is the same
        return
    expected = run(unet)
    assert torch.equal(run(built), expected)
    if name in ("LoRA layers of PEFT", "FreeU", "a norm's eps", "no norm", "shared blocks"):
        assert not torch.equal(expected, original)


def test_training_mode_is_said_once_with_its_remedy() -> None:
    unet = make_unet().train()
    unet.conv_norm_out.eps = 0.25
    _, difference = made_from(unet)
    assert difference.startswith(
        "it is in training mode (call its eval() before you lend it); eps of conv_norm_out is 0.25, in the workers it"
    )


def test_lists_are_shown_as_in_python() -> None:
    unet = make_unet()
    unet.sizes = [8, 4]
    _, difference = made_from(unet)
    assert difference == "sizes of the module is [8, 4], in the workers it is absent"


def test_an_unchanged_module_is_as_made() -> None:
    unet = make_unet()
    built, difference = made_from(unet)
    assert difference == ""
    assert torch.equal(run(built), run(unet))


class Own(torch.nn.Linear):
    """A class that is in no package of models."""


def plant_class(unet: Any) -> None:
    unet.time_embedding.linear_1 = Own(8, 32)


def replace_forward(unet: Any) -> None:
    unet.conv_in.forward = lambda sample: sample


def add_hook(unet: Any) -> None:
    unet.conv_in.register_forward_hook(lambda *_: None)


def add_function(unet: Any) -> None:
    unet.conv_in.own = len


@pytest.mark.parametrize(
    ("change", "path", "what"),
    [
        (plant_class, f"{__name__}:Own", "only classes of the models of"),
        (replace_forward, "conv_in", "forward of conv_in is a function"),
        (add_hook, "conv_in", "_forward_hooks of conv_in is function"),
        (add_function, "conv_in", "own of conv_in is a function"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_by_path_and_attribute(
    change: Callable[[Any], None], path: str, what: str
) -> None:
    unet = make_unet()
    change(unet)
    with pytest.raises(Unsupported) as caught:
        made_from(unet)
    assert path in str(caught.value)
    assert what in str(caught.value)


@pytest.fixture
def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 2, 2),
    ).eval()


def test_a_step_cache_of_diffusers_is_refused(flux: Any) -> None:
    flux.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(Unsupported, match=r"workers cannot make this module as it is: .*forward"):
        made_from(flux)


def test_the_attention_backend_of_the_processors_is_set(flux: Any) -> None:
    flux.set_attention_backend("_native_math")
    built, difference = made_from(flux)
    assert difference
    before = flux.transformer_blocks[0].attn.processor._attention_backend
    assert built.transformer_blocks[0].attn.processor._attention_backend is before


LINEAR = "torch.nn.modules.linear:Linear"


def bare(**submodules: SubmoduleState) -> ModuleState:
    return ModuleState(submodules={"": SubmoduleState(class_name=LINEAR), **submodules})


def with_attribute(name: str, value: Argument) -> ModuleState:
    return ModuleState(submodules={"": SubmoduleState(class_name=LINEAR, attributes={name: value})})


def many() -> ModuleState:
    return bare(**{f"m{number}": SubmoduleState(class_name=LINEAR) for number in range(16_000)})


HOSTILE: dict[str, tuple[ModuleState, type[Exception], str]] = {
    "no module": (ModuleState(submodules={}), BadRequest, "does not describe its submodule ''"),
    "no parent": (bare(**{"a.b": SubmoduleState(class_name=LINEAR)}), BadRequest, "'a.b' without its parent"),
    "another class": (
        ModuleState(submodules={"": SubmoduleState(class_name="torch.nn.modules.conv:Conv1d")}),
        Unsupported,
        "Conv1d is lent, but its configuration is of",
    ),
    "a function": (bare(a=SubmoduleState(class_name="os:system")), Unsupported, "class os:system"),
    "a module": (bare(a=SubmoduleState(class_name="torch:hub")), Unsupported, "class torch:hub"),
    "no nn.Module": (
        bare(a=SubmoduleState(class_name="diffusers.models.attention_processor:AttnProcessor")),
        Unsupported,
        "this is no module",
    ),
    "a cycle": (
        ModuleState(
            submodules={"": SubmoduleState(class_name=LINEAR), "a": SubmoduleState(class_name=LINEAR)},
            same={"a.b": "a"},
        ),
        BadRequest,
        "does not describe its submodule 'a.b.b'",
    ),
    "a path twice": (
        ModuleState(submodules=bare(a=SubmoduleState(class_name=LINEAR)).submodules, same={"a": ""}),
        BadRequest,
        "does not describe its submodule 'a.a'",
    ),
    "same as nothing": (
        ModuleState(submodules=bare().submodules, same={"a": "b"}),
        BadRequest,
        "'a' without its parent",
    ),
    "_modules": (with_attribute("_modules", 1), BadRequest, "attribute _modules: every module has its own"),
    "_parameters": (with_attribute("_parameters", 1), BadRequest, "attribute _parameters"),
    "training": (with_attribute("training", 1.5), BadRequest, "attribute training"),
    "a missing submodule": (with_attribute("x", Named(name="submodule:no.such")), BadRequest, "submodule:no.such"),
    "a list as a key": (
        with_attribute("x", PairsOf(items=((ListOf(items=()), 1),))),
        BadRequest,
        "a ListOf has no value here",
    ),
    "a list in a set": (with_attribute("x", SetOf(items=(MapOf(items={}),))), BadRequest, "a MapOf has no value"),
    "no enumeration": (with_attribute("x", Named(name=f"{LINEAR}.forward")), Unsupported, "no member of an enumer"),
    "no dtype": (with_attribute("x", Named(name="torch.load")), Exception, "dtype 'load'"),
    "a call's tensor": (with_attribute("x", Values(dtype="bool", shape=(), values=())), BadRequest, "a Values has no"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_states_are_refused(name: str) -> None:
    state, kind, message = HOSTILE[name]
    with pytest.raises(kind) as caught:
        apply_state(torch.nn.Linear(1, 1).eval(), state)
    assert message in str(caught.value)


def test_a_state_has_the_versions_of_the_packages_of_its_classes() -> None:
    unet = make_unet()
    described, _ = describe_module(unet, "unet")
    versions = module_state.decode(described.state).versions
    assert versions == {"diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0]}
    check_versions(versions)


def test_lora_layers_bring_the_version_of_peft() -> None:
    unet = make_unet()
    inject_lora(unet)
    described, _ = describe_module(unet, "unet")
    assert set(module_state.decode(described.state).versions) == {"diffusers", "peft", "torch"}


def test_other_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported) as caught:
        check_versions({"torch": torch.__version__.partition("+")[0], "diffusers": "0.1.0"})
    here = diffusers.__version__
    assert f"diffusers is 0.1.0 in your process and {here} in the workers" in caught.value.detail
    assert "torch" not in caught.value.detail
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Unsupported, match=r"peft is 0\.1\.0 in your process and not installed in the workers"):
        check_versions({"peft": "0.1.0"})
    with pytest.raises(Unsupported, match="package 'antigravity': only classes of"):
        check_versions({"antigravity": "1"})


@pytest.mark.parametrize("name", ["__class__", "__dict__", "__init__", "forward"])
def test_an_attribute_of_a_special_name_is_no_more_than_an_attribute(name: str) -> None:
    module = torch.nn.Linear(1, 1, bias=False).eval()
    apply_state(
        module,
        ModuleState(
            submodules={
                "": SubmoduleState(
                    class_name=LINEAR,
                    parameters=("weight",),
                    empty_parameters=("bias",),
                    attributes={"in_features": 1, "out_features": 1, name: "text"},
                )
            }
        ),
    )
    assert type(module) is torch.nn.Linear
    assert vars(module)[name] == "text"


def test_very_many_submodules_are_no_fault() -> None:
    """A state holds so many at most; a forward does not use what the class does not know."""
    state = many()
    linear = torch.nn.Linear(1, 1).eval()
    assert apply_state(linear, state)
    assert len(linear._modules) == 16_000


MANY_LAYERS = '{"num_layers": 1000000000, "attention_head_dim": 8, "num_attention_heads": 1}'


@pytest.mark.parametrize(
    ("class_name", "config", "kind", "message"),
    [
        ("diffusers:AutoencoderKL", "{", BadRequest, "its configuration is not JSON"),
        ("diffusers:AutoencoderKL", "[" * 60_000, BadRequest, "its configuration is not JSON"),
        ("diffusers:AutoencoderKL", "5", BadRequest, "its configuration is a int, not an object"),
        ("diffusers:AutoencoderKL", '"someone/model"', BadRequest, "its configuration is a str, not an object"),
        ("diffusers:AutoencoderKL", '{"down_block_types": 5}', BadRequest, "AutoencoderKL cannot be made"),
        ("diffusers:FluxTransformer2DModel", MANY_LAYERS, BadRequest, "makes more than 16384 parameters"),
        ("diffusers:DDIMScheduler", "{}", Unsupported, "whose classes cannot be used"),
        (LINEAR, "{}", Unsupported, "is no model class of diffusers or transformers"),
        ("transformers:CLIPTextConfig", "{}", Unsupported, "is no model class of diffusers or transformers"),
        ("transformers:CLIPTextModel", '{"hidden_size": "x"}', BadRequest, "CLIPTextModel cannot be made"),
        (
            "transformers:CLIPTextModel",
            '{"text": [{"_attn_implementation": "someone/kernels"}]}',
            Unsupported,
            "workers load no code from a hub",
        ),
        (
            "transformers:CLIPTextModel",
            '{"experts_implementation": {"": "eager", "text_config": "someone/kernels"}}',
            Unsupported,
            "workers load no code from a hub",
        ),
    ],
)
def test_descriptions_that_make_no_module_are_refused(
    class_name: str, config: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        build_module(ModuleDescription(class_name=class_name, config=config))
    assert message in str(caught.value)
