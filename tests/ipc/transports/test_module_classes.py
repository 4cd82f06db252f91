"""Classes that messages name: those of models alone, and no import of a script."""

from __future__ import annotations

import sys

import pytest

from xditd.ipc.errors import Unsupported
from xditd.ipc.transports.module_classes import find_class, find_named


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torch.nn.modules.linear:Linear", "Linear"),
        ("diffusers:AutoencoderKL", "AutoencoderKL"),
        ("diffusers.models.attention_processor:AttnProcessor2_0", "AttnProcessor2_0"),
        ("transformers.cache_utils:DynamicCache", "DynamicCache"),
        ("transformers.modeling_outputs:BaseModelOutput", "BaseModelOutput"),
        ("diffusers.pipelines.ltx2.connectors:LTX2TextConnectors", "LTX2TextConnectors"),
        ("transformers.generation.configuration_utils:GenerationConfig", "GenerationConfig"),
        ("peft.tuners.lora.layer:Linear", "Linear"),
    ],
)
def test_classes_of_models_are_found(name: str, found: str) -> None:
    assert find_class(name, "the workers").__name__ == found


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("os:system", "only classes of the models of"),
        ("builtins:object", "only classes of the models of"),
        (":", "only classes of the models of"),
        ("torch:hub", "only classes of the models of"),
        ("torch.utils.bottleneck.__main__:main", "only classes of the models of"),
        ("torch.distributed.run:main", "only classes of the models of"),
        ("diffusers.models.__main__:x", "only classes of the models of"),
        ("transformers.models.bert.convert_bert_original_tf_checkpoint_to_pytorch:x", "only classes of the models"),
        ("torch.nn.modules.linear:torch", "torch is a module, not a class"),
        ("torch.nn.modules.linear:F.linear", "F is a module, not a class"),
        ("torch.nn.modules.linear:Linear.forward", "forward is a function, not a class"),
        ("diffusers.models.modeling_utils:OrderedDict", "it is one of collections"),
        ("torch.nn.modules.linear:Linear.__class__", "it is one of builtins"),
        ("torch.nn.modules.linear:Missing", "torch .* of the workers has no such class: AttributeError"),
        ("torch.nn.utils.parametrize:ParametrizedLinear", "parametrised modules .*parametrize.remove_parametrizations"),
        ("torch.nn.modules.missing:Linear", "torch .* of the workers has no such class: ModuleNotFoundError"),
        ("torch.nn.modules.linear:", "torch .* of the workers has no such class"),
    ],
)
def test_all_others_are_refused(name: str, why: str) -> None:
    with pytest.raises(Unsupported, match=why) as caught:
        find_class(name, "the workers")
    assert str(caught.value).startswith(f"class {name}: ")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not there
    with pytest.raises(Unsupported, match="peft is not installed in the workers: pip install peft"):
        find_class("peft.tuners.lora.missing:Linear", "the workers")


def test_a_refused_module_is_not_imported() -> None:
    name = "torch.utils.bottleneck"
    sys.modules.pop(name, None)
    with pytest.raises(Unsupported):
        find_class(f"{name}:main", "the workers")
    assert name not in sys.modules


def test_named_classes_are_those_of_models_alone() -> None:
    assert find_named("class:transformers.cache_utils:DynamicLayer", "the workers").__name__ == "DynamicLayer"
    with pytest.raises(Unsupported, match="class os:system: only classes of the models of"):
        find_named("class:os:system", "the workers")
