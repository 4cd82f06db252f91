"""Changes of a patcher: each allowed one passes, and an unknown one is refused at every level."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xditd.client import Unsupported
from xditd.client.comfyui.understood import BOOKKEEPING, CALLBACKS, COMPILE_KEY, WRAPPERS, Understood, why_model_changed

OWN = "xditd"


class Sampling:
    sigma_max = 1.0

    def timestep(self, sigma: float) -> float:
        return sigma


class Shifted(Sampling):
    """A model_sampling with another schedule and the same step."""

    sigma_max = 0.9


class Scaled(Sampling):
    def timestep(self, sigma: float) -> float:
        return 1000.0 * sigma


class Halved(Sampling):
    def timestep(self, sigma: float) -> float:
        return 0.5 * sigma


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.manual_cast_dtype = None
        self.model_sampling = Sampling()
        self.linear = torch.nn.Linear(1, 1, device="meta")

    def get_dtype(self) -> torch.dtype:
        return torch.bfloat16


class Patcher:
    """The attributes of ComfyUI's patcher, as its constructor sets them."""

    def __init__(self) -> None:
        self.model: Any = Model()
        self.patches: dict[str, Any] = {}
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        self.weight_wrapper_patches: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.force_cast_weights = False
        self.attachments: dict[str, Any] = {}
        self.additional_models: dict[str, Any] = {}
        self.callbacks: dict[str, Any] = {}
        self.wrappers: dict[str, Any] = {}
        self.injections: dict[str, Any] = {}
        self.hook_patches: dict[str, Any] = {}
        self.forced_hooks: Any = None
        self.is_clip = False
        self.is_multigpu_base_clone = False
        self.what_a_later_comfyui_adds: list[Any] = []

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, getattr(self.model, name))


@pytest.fixture
def patcher() -> Patcher:
    return Patcher()


@pytest.fixture
def understood(patcher) -> Understood:
    return Understood(patcher)


def put(name: str, *keys: str, value: Any = print) -> Callable[[Any], None]:
    """Return a function that sets an attribute, or a key in its nested dicts."""

    def change(patcher: Any) -> None:
        if not keys:
            setattr(patcher, name, value)
            return
        inner = getattr(patcher, name)
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value

    change.__name__ = ".".join((name, *keys))
    return change


ALLOWED = [
    *[put("wrappers", kind, "pack", value=[print]) for kind in sorted(WRAPPERS)],
    *[put("callbacks", kind, "pack", value=[print]) for kind in sorted(CALLBACKS)],
    *[put(name, value=print) for name in sorted(BOOKKEEPING - {"model", "object_patches_backup"})],
    put("patches", "linear.weight", value=[object()]),
    put("object_patches", "model_sampling", value=Shifted()),
    put("object_patches", "model_sampling", value=Halved()),
    put("object_patches", "manual_cast_dtype", value=None),
    put("object_patches", "manual_cast_dtype", value=torch.bfloat16),
    put("model_options", "model_function_wrapper"),
    put("model_options", "context_handler"),
    put("model_options", "transformer_options", "easycache"),
    put("additional_models", "pack", value=[object()]),
    put("injections", "pack", value=[]),
    put("force_cast_weights", value=True),
]


@pytest.mark.parametrize("change", ALLOWED, ids=lambda each: each.__name__)
def test_each_entry_of_the_list(change, patcher, understood):
    change(patcher)
    understood.check(patcher)
    understood.check_step()


REFUSED = [
    (put("wrappers", "a_kind", "pack", value=[print]), r"wrappers of the kind 'a_kind' \(print\)"),
    (put("callbacks", "a_kind", "pack", value=[print]), r"callbacks of the kind 'a_kind'"),
    (put("object_patches", "diffusion_model.forward_orig"), r"object patch diffusion_model.forward_orig \(print\)"),
    (put("object_patches", "model_sampling", value=Scaled()), r"Scaled of test_understood, with timesteps up to 1000"),
    (put("object_patches", "manual_cast_dtype", value=torch.float16), "manual_cast_dtype"),
    (put("weight_wrapper_patches", "linear.weight"), "weight wrappers"),
    (put("model_options", "a_key"), "'a_key'"),
    (put("model_options", "transformer_options", "a_key"), "'a_key'"),
    (put("additional_models", "multigpu", value=[object()]), "several GPUs"),
    (put("injections", "pack", value=[SimpleNamespace(inject=print)]), r"pack injects .*\(print\)"),
    (put("injections", "bypass_lora", value=[SimpleNamespace(inject=print)]), "LoraLoaderBypassModelOnly"),
    (put("hook_patches", "ref", value={"linear.weight": [(1.0, ("diff", ()), 1.0, None, None)]}), "what is no LoRA"),
    (put("forced_hooks", value=object()), "hooks on the MODEL itself"),
    (put("is_multigpu_base_clone", value=True), "several GPUs"),
    (put("what_a_later_comfyui_adds", value=[print]), "what_a_later_comfyui_adds of the patcher"),
    (put("an_attribute"), r"an_attribute of the patcher \(print\)"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=lambda each: getattr(each, "__name__", ""))
def test_something_unknown_at_every_level(change, said, patcher, understood):
    change(patcher)
    with pytest.raises(Unsupported, match=said):
        understood.check(patcher)


def test_all_faults_come_at_once(patcher, understood):
    patcher.an_attribute = print
    patcher.model.linear.register_forward_hook(print)
    with pytest.raises(Unsupported, match=r"an_attribute.*; the module linear has a forward hook"):
        understood.check(patcher)


def test_a_change_within_a_step(patcher, understood):
    understood.check(patcher)
    understood.check_step()
    patcher.model.linear.forward = print
    with pytest.raises(Unsupported, match=r"linear\.forward was replaced"):
        understood.check_step()


def test_another_model_of_the_same_make_is_compared(understood):
    other = Patcher()
    understood.check(other)
    other.model.linear.forward = print
    with pytest.raises(Unsupported, match=r"linear\.forward was replaced"):
        understood.check(other)


KINDS = sorted(WRAPPERS)

FUSED = [
    put("wrappers", "diffusion_model", OWN, value=[print]),
    put("wrappers", "apply_model", COMPILE_KEY, value=[print]),
    put("wrappers", "apply_model", "pack", value=[]),
    put("model_options", "torch_compile_kwargs", value={"backend": "inductor"}),
    put("model_options", "transformer_options", "patches", value={}),
    put("object_patches", "model_sampling", value=Shifted()),
    put("attachments", "pack"),
    put("patches", "linear.weight", value=[object()]),
]


@pytest.mark.parametrize("change", FUSED, ids=lambda each: each.__name__)
def test_what_the_whole_loop_leaves_out_nothing_of(change, patcher):
    change(patcher)
    assert why_model_changed(patcher, patcher.model.model_sampling, OWN) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *[(put("wrappers", kind, "pack", value=[print]), f"pack wraps the model ({kind})") for kind in KINDS],
        *[(put("callbacks", kind, "pack", value=[print]), kind) for kind in sorted(CALLBACKS)],
        (put("wrappers", "a_kind", "pack", value=[print]), "a_kind"),
        (put("model_options", "context_handler"), "context_handler (print)"),
        (put("model_options", "disable_cfg1_optimization", value=True), "disable_cfg1_optimization"),
        (put("model_options", "what_a_pack_sets"), "what_a_pack_sets"),
        (put("model_options", "sampler_post_cfg_function", value=[print]), "sampler_post_cfg_function (print)"),
        (put("model_options", "transformer_options", "easycache"), "easycache"),
        (put("object_patches", "model_sampling", value=Halved()), "Halved"),
        (put("object_patches", "diffusion_model"), "object patches (diffusion_model)"),
        (put("additional_models", "pack", value=[object()]), "additional models"),
    ],
)  # fmt: skip
def test_what_the_whole_loop_would_leave_out(change, said, patcher):
    change(patcher)
    reason = why_model_changed(patcher, patcher.model.model_sampling, OWN)
    assert reason is not None
    assert said in reason
