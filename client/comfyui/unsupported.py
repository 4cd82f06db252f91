"""Find and refuse options and conditioning that a forward in the workers cannot apply.

Without this, a node that changes the model in Python would be ignored silently, and the image would be wrong. So only
known options pass; every other one counts as a change of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from xditd.client.comfyui.naming import name_of
from xditd.ipc.errors import Unsupported

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import ModelAdapter

RUN_OPTIONS: Final = frozenset({
    "callbacks", "cond_or_uncond", "context_window", "prefetch_dynamic_vbars", "sample_sigmas", "sigmas", "uuids",
    "wrappers",
})  # fmt: skip
"""``transformer_options`` of ComfyUI's own sampler: the state of the run, or functions called around the model."""

NODE_OPTIONS: Final = frozenset({"easycache"})
"""``transformer_options`` of stock nodes that only those nodes' own wrappers read (EasyCache, LazyCache)."""

_BLOCK_OPTIONS: Final = {
    "patches": "a patch of the model's blocks",
    "patches_replace": "a replacement of the model's blocks",
    "optimized_attention_override": "an attention override",
    "rope_options": "a change of RoPE (position embeddings)",
}

SAMPLER_FUNCTIONS: Final = {
    "denoise_mask_function": "a denoise mask function",
    "model_function_wrapper": "a model function wrapper",
    "sampler_calc_cond_batch_function": "a conditioning batch function",
    "sampler_cfg_function": "a CFG function",
    "sampler_post_cfg_function": "a post-CFG function",
    "sampler_pre_cfg_function": "a pre-CFG function",
}
"""``model_options`` that ComfyUI's sampler calls around the model: they run in ComfyUI, on the workers' predictions."""

MODEL_OPTIONS: Final = frozenset({
    *SAMPLER_FUNCTIONS, "context_handler", "disable_cfg1_optimization", "registered_hooks", "to_load_options",
    "torch_compile_kwargs", "transformer_options",
})  # fmt: skip
"""All known ``model_options``; hooks are looked for in the conditioning, where they come from."""

_BLOCK_CHANGES: Final = frozenset(
    {"set_model_options_patch_replace", "patches_replace", "optimized_attention_override", "rope_options"}
)
"""Names in the code of functions that run the model once more with changed blocks."""

_CONDITIONS: Final = {
    "gligen": "GLIGEN",
}
"""Keys of conditioning that no model in the workers can use; a family's adapter adds its own."""


_WEIGHT_HOOK: Final = "weight"
"""ComfyUI's kind of hooks that patch weights (Create Hook LoRA)."""


def refuse(found: Iterable[str], what: str = "XDiT") -> None:
    """Raise one error that names all of ``found``; return if there is nothing.

    Raises:
        Unsupported: names each of them.
    """
    found = list(dict.fromkeys(found))
    if found:
        raise Unsupported(
            f"{what}: {'; '.join(found)} cannot run in the workers, which hold the model; remove the node, or use the "
            "stock model without XDiT"
        )


def check_forward(transformer_options: Mapping[str, Any], faults: Iterable[str] = ()) -> None:
    """Refuse a forward whose options need Python code or another model inside ComfyUI.

    ``faults`` are those that the family's adapter found in the other arguments.

    Raises:
        Unsupported: names each of them.
    """
    refuse([*faults, *option_faults(transformer_options)])


def option_faults(transformer_options: Mapping[str, Any]) -> Iterator[str]:
    """Name the ``transformer_options`` that change the model or are unknown."""
    for key, value in transformer_options.items():
        if key in RUN_OPTIONS or key in NODE_OPTIONS or is_empty(value):
            continue
        what = _BLOCK_OPTIONS.get(key)
        if what is None:
            yield f"the transformer option {key!r} ({name_of(value)})"
        elif isinstance(value, Mapping):
            yield f"{what} ({', '.join(_describe_places(value))})"
        else:
            yield f"{what} ({name_of(value)})"


def model_option_faults(model_options: Mapping[str, Any]) -> Iterator[str]:
    """Name unknown ``model_options``, and functions that run the model with changed blocks."""
    for key, value in model_options.items():
        if key not in MODEL_OPTIONS and not is_empty(value):
            yield f"the model option {key!r} ({name_of(value)})"
        if key in SAMPLER_FUNCTIONS:
            for function in value if isinstance(value, Sequence) else [value]:
                if _changes_blocks(function):
                    yield f"{SAMPLER_FUNCTIONS[key]} that runs the model with other blocks ({name_of(function)})"
    yield from option_faults(model_options.get("transformer_options", {}))


def condition_faults(conditions: Mapping[str, Iterable[Mapping[str, Any]]], family: ModelAdapter) -> Iterator[str]:
    """Name what positive and negative conditioning carry, in any step, that the workers cannot run."""
    for parts in conditions.values():
        for part in parts:
            yield from (what for key, what in _CONDITIONS.items() if not is_empty(part.get(key)))
            if not is_empty(part.get("hooks")):
                yield from _hook_faults(part["hooks"])
            yield from family.condition_faults(part)


def _hook_faults(group: Any) -> Iterator[str]:
    """Name the hooks of a group that are not of weights; those of weights are checked where they are registered."""
    for hook in getattr(group, "hooks", [group]):
        kind = getattr(getattr(hook, "hook_type", None), "value", name_of(hook))
        if kind != _WEIGHT_HOOK:
            yield f"hooks of the kind {kind!r}"


def _describe_places(patches: Mapping[Any, Any]) -> Iterator[str]:
    """Name the places of patches, and the nodes that set them."""
    for place, values in sorted(patches.items(), key=lambda item: str(item[0])):
        inner = values.values() if isinstance(values, Mapping) else values
        owners = sorted({name_of(each) for each in inner}) if isinstance(inner, Iterable) else [name_of(inner)]
        yield f"{place}: {', '.join(owners)}" if owners else str(place)


def _changes_blocks(function: Any) -> bool:
    """Return whether a function's code, read before it is called, runs the model with changed blocks."""
    pending = [getattr(getattr(function, "func", function), "__code__", None)]
    while pending:
        code = pending.pop()
        if code is None:
            continue
        if _BLOCK_CHANGES & {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))}:
            return True
        pending += [each for each in code.co_consts if hasattr(each, "co_names")]
    return False


def is_empty(value: object) -> bool:
    """Return whether an option or a part of conditioning has no effect: None, False or an empty container."""
    return value is None or value is False or (isinstance(value, (Mapping, Sequence)) and not value)
