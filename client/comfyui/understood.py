"""Refuse changes of a MODEL, CLIP or VAE that the workers cannot run, by comparing its patcher with a fresh one.

Patches of weights are merged or become branches. Wrappers and callbacks of known kinds, ``model_sampling`` and sampler
functions run in ComfyUI, around the workers. Everything else must be as the loader made it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

from xditd.client.comfyui.baseline import Baseline
from xditd.client.comfyui.lora_patches import read_bypass, read_patches
from xditd.client.comfyui.naming import name_of
from xditd.client.comfyui.unsupported import model_option_faults, refuse
from xditd.ipc.name_lists import listed

WRAPPERS: Final = frozenset({
    "apply_model", "calc_cond_batch", "diffusion_model", "outer_sample", "predict_noise", "prepare_sampling",
    "sampler_sample",
})  # fmt: skip
"""Kinds of wrappers that ComfyUI calls around the model, or around our own wrapper."""

CALLBACKS: Final = frozenset({
    "on_apply_hooks", "on_cleanup", "on_clone", "on_deepclone_multigpu", "on_detach_after", "on_eject_model",
    "on_inject_model", "on_load_after", "on_match_multigpu_clones", "on_pre_run", "on_prepare_state",
    "on_register_all_hook_patches",
})  # fmt: skip
"""Kinds of callbacks that work on our MODEL as on any other."""

BOOKKEEPING: Final = frozenset({
    "attachments", "backup", "backup_buffers", "cached_hook_patches", "cached_patcher_init", "clone_base_uuid",
    "current_hooks", "hook_backup", "hook_mode", "hook_patches_backup", "is_clip", "is_injected", "load_device",
    "model", "non_dynamic_delegate_model", "object_patches_backup", "offload_device", "parent", "patches_uuid",
    "pinned", "size", "skip_injection", "understood", "weight_inplace_update",
})  # fmt: skip
"""Attributes for a patcher's own records, and ``attachments``, which it never reads."""

MODEL_SAMPLING: Final = "model_sampling"
COMPUTE_DTYPE: Final = "manual_cast_dtype"
COMPILE_KEY: Final = "torch.compile"
"""Key of TorchCompileModel's wrapper, which only makes a local model faster."""

_DESCRIPTIONS: Final = {
    "injections": "injects Python code into the model",
    "hook_patches": "hooks that change weights by what is no LoRA",
    "forced_hooks": "hooks on the MODEL itself",
    "weight_wrapper_patches": "weight wrappers",
    "additional_models": "additional models",
    "is_multigpu_base_clone": "ComfyUI's own split over several GPUs",
}
_NODES: Final = {"bypass_lora": "LoraLoaderBypass, LoraLoaderBypassModelOnly"}
"""Stock nodes by the keys of their injections."""

_SAMPLING_METHODS: Final = (
    "timestep", "calculate_input", "calculate_denoised", "noise_scaling", "inverse_noise_scaling",
)  # fmt: skip


class Understood:
    """Records one MODEL, CLIP or VAE as loaded, and names later changes that the workers cannot run."""

    def __init__(self, patcher: Any, label: str = "XDiT") -> None:
        """Record ``patcher`` and its modules as they are; nobody may have changed them yet."""
        module = patcher.model
        self._fresh = {name: _copied(value) for name, value in vars(patcher).items() if name not in BOOKKEEPING}
        self._label = label
        self._module = weakref.ref(module)
        self.baseline = Baseline(module, without=(MODEL_SAMPLING,))
        self.sampling = getattr(module, MODEL_SAMPLING, None)
        self._latent_format = type(getattr(module, "latent_format", None))
        self._dtypes = {
            None,
            getattr(module, COMPUTE_DTYPE, None),
            module.get_dtype() if hasattr(module, "get_dtype") else None,
        }

    def check(self, patcher: Any) -> None:
        """Refuse a patcher with changes that the workers cannot run.

        Raises:
            Unsupported: names each change.
        """
        refuse(self.faults(patcher), self._label)
        if patcher.model is self._module():
            self.baseline.accept(patcher.model)

    def faults(self, patcher: Any) -> Iterator[str]:
        """Name changes of a patcher and its modules that the workers cannot run."""
        yield from self._patcher_faults(patcher)
        latent_format = getattr(patcher.model, "latent_format", None)
        if type(latent_format) is not self._latent_format:
            yield f"latent_format was replaced ({name_of(latent_format)})"
        yield from self._module_faults(patcher.model, getattr(patcher, "object_patches_backup", {}))

    def _module_faults(self, module: Any, unless: Mapping[str, Any]) -> Iterator[str]:
        """Name what differs in the modules; ``unless`` are attributes that the patcher itself replaces for a run."""
        yield from self.baseline.foreign_methods()
        yield from self.baseline.differences(module, unless)

    def check_step(self) -> None:
        """Check the modules again within a step, as :meth:`check` does; 0.1 ms if nothing changed since."""
        module = self._module()
        if module is not None and not self.baseline.is_intact(module):
            refuse(self._module_faults(module, {}), self._label)
            self.baseline.accept(module)

    def _patcher_faults(self, patcher: Any) -> Iterator[str]:
        for name, value in vars(patcher).items():
            if name in BOOKKEEPING or name == "patches":
                continue
            if name == "object_patches":
                yield from self._object_faults(value)
            elif name == "model_options":
                yield from model_option_faults(value)
            elif name in ("wrappers", "callbacks"):
                known = WRAPPERS if name == "wrappers" else CALLBACKS
                for kind, by_key in value.items():
                    if kind not in known and any(by_key.values()):
                        yield f"{name} of the kind {kind!r} ({_owners(by_key)})"
            elif name == "additional_models":
                if value.get("multigpu"):
                    yield _DESCRIPTIONS["is_multigpu_base_clone"]
            elif name == "force_cast_weights":
                pass  # is set with a compute dtype, which _object_faults checks
            elif name == "forced_hooks" and patcher.is_clip:
                pass  # Set CLIP Hooks, whose patches are among hook_patches; stock uses no other kind for a CLIP
            elif name == "hook_patches":
                by_weight = [(key, each) for patches in value.values() for key, each in patches.items()]
                if any(read_patches(each, self._shape_of(key)) is None for key, each in by_weight):
                    yield _DESCRIPTIONS[name]
            elif name == "injections":
                for key, each in ((key, each) for key, each in value.items() if each):
                    if read_bypass(each, self._shape_of) is not None:
                        continue  # LoRAs, which become branches
                    yield f"{key} {_DESCRIPTIONS[name]} ({_NODES.get(key) or _owners({key: each})})"
            elif not _is_same(value, self._fresh.get(name)):
                yield _DESCRIPTIONS.get(name) or f"{name} of the patcher ({name_of(value)})"

    def _shape_of(self, path: str) -> Sequence[int]:
        found: Sequence[int] = attrgetter(path)(self._module()).shape
        return found

    def _object_faults(self, patches: Mapping[str, Any]) -> Iterator[str]:
        for name, value in patches.items():
            if name == MODEL_SAMPLING and self.sampling is not None:
                largest, own = (float(each.timestep(each.sigma_max)) for each in (value, self.sampling))
                if largest > own:
                    kind = name_of(type(value))
                    yield f"model_sampling of {kind}, with timesteps up to {largest:g} (the model's own: {own:g})"
            elif name != COMPUTE_DTYPE or value not in self._dtypes:
                yield f"the object patch {name} ({name_of(value)})"


def why_model_changed(patcher: Any, made: Any, own_key: str) -> str | None:
    """Name a change of a MODEL, other than of its weights, that the workers' loop would ignore, or return None.

    ``made`` is its ``model_sampling`` as loaded; ``own_key`` is the key of XDiT's own wrappers.
    """
    for what, kinds in (("wraps", patcher.wrappers), ("has a callback in", patcher.callbacks)):
        for kind, by_key in kinds.items():
            for key, functions in by_key.items():
                if functions and key not in (own_key, COMPILE_KEY):
                    return f"{key or _owners({key: functions})} {what} the model ({kind})"
    for key, value in patcher.model_options.items():
        if key == "transformer_options":
            if any(value.values()):
                return f"the model has the transformer options {listed(sorted(map(str, value)))}"
        elif key != "torch_compile_kwargs" and value:
            owners = listed(name_of(each) for each in (value if isinstance(value, list) else [value]))
            return f"the model has {key} ({owners})"
    others = [name for name in patcher.object_patches if name not in (MODEL_SAMPLING, COMPUTE_DTYPE)]
    if others:
        return f"the model has object patches ({listed(others)})"
    if patcher.additional_models:
        return f"the model has additional models ({listed(map(str, patcher.additional_models))})"
    sampling = patcher.get_model_object(MODEL_SAMPLING)
    return None if have_same_steps(sampling, made) else f"model_sampling is that of {name_of(type(sampling))}"


def have_same_steps(sampling: Any, made: Any) -> bool:
    """Return whether two ``model_sampling`` compute the same step from the same sigmas; schedules may differ."""
    return sampling is made or all(
        name not in vars(sampling) and getattr(type(sampling), name, None) is getattr(type(made), name, None)
        for name in _SAMPLING_METHODS
    )


def _owners(by_key: Mapping[Any, Sequence[Any]]) -> str:
    found = []
    for key, functions in by_key.items():
        for each in functions:
            inner = getattr(each, "inject", each)
            found.append(name_of(inner))
        if key is not None and not functions:
            found.append(str(key))
    return listed(dict.fromkeys(found))


def _is_same(value: Any, fresh: Any) -> bool:
    if value is fresh or (not value and not fresh):
        return True
    return type(value) is type(fresh) and isinstance(value, (bool, int, float, str, dict, list, set)) and value == fresh


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value
