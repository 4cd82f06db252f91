"""What a forward in the workers cannot honour: found before anything runs, and named with what to do about it.

A node that changes the model in Python would otherwise be ignored in silence, and the picture would be another one.
So this asks for what is understood, and takes everything else for a change.
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
"""``transformer_options`` of ComfyUI's own sampler: they say where a run is, or are called around the model."""

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
"""``model_options`` that ComfyUI's sampler calls around the model: they run here, on what the workers predict."""

MODEL_OPTIONS: Final = frozenset({
    *SAMPLER_FUNCTIONS, "context_handler", "disable_cfg1_optimization", "registered_hooks", "to_load_options",
    "torch_compile_kwargs", "transformer_options",
})  # fmt: skip
"""Every ``model_options`` that is understood; hooks are looked for where they come from, in the conditioning."""

_MARKS: Final = frozenset(
    {"set_model_options_patch_replace", "patches_replace", "optimized_attention_override", "rope_options"}
)
"""Names in the code of a function that runs the model once more, with other blocks."""

_CONDITIONS: Final = {
    "control": "ControlNet",
    "gligen": "GLIGEN",
    "hooks": "hooks (scheduled LoRAs)",
}
"""What conditioning may carry that no model in the workers can be given; a family's adapter knows of more."""


def refuse(found: Iterable[str], what: str = "XDiT") -> None:
    """Raise one error of all that was found, or return where that is nothing.

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
    """Refuse a forward that carries what lives as Python code, or another model, inside ComfyUI.

    ``faults`` are those that the family's adapter has found in its other arguments.

    Raises:
        Unsupported: names each of them.
    """
    refuse([*faults, *option_faults(transformer_options)])


def option_faults(transformer_options: Mapping[str, Any]) -> Iterator[str]:
    """Name the ``transformer_options`` that change the model, or that are not understood."""
    for key, value in transformer_options.items():
        if key in RUN_OPTIONS or key in NODE_OPTIONS or is_empty(value):
            continue
        what = _BLOCK_OPTIONS.get(key)
        if what is None:
            yield f"the transformer option {key!r} ({name_of(value)})"
        elif isinstance(value, Mapping):
            yield f"{what} ({', '.join(_described(value))})"
        else:
            yield f"{what} ({name_of(value)})"


def model_option_faults(model_options: Mapping[str, Any]) -> Iterator[str]:
    """Name the ``model_options`` that are not understood, and functions that run the model with other blocks."""
    for key, value in model_options.items():
        if key not in MODEL_OPTIONS and not is_empty(value):
            yield f"the model option {key!r} ({name_of(value)})"
        if key in SAMPLER_FUNCTIONS:
            for function in value if isinstance(value, Sequence) else [value]:
                if _changes_blocks(function):
                    yield f"{SAMPLER_FUNCTIONS[key]} that runs the model with other blocks ({name_of(function)})"
    yield from option_faults(model_options.get("transformer_options", {}))


def condition_faults(conditions: Mapping[str, Iterable[Mapping[str, Any]]], family: ModelAdapter) -> Iterator[str]:
    """Name what positive and negative conditioning carry that the workers cannot run, at whatever step it begins."""
    for parts in conditions.values():
        for part in parts:
            yield from (what for key, what in _CONDITIONS.items() if not is_empty(part.get(key)))
            yield from family.condition_faults(part)


def _described(patches: Mapping[Any, Any]) -> Iterator[str]:
    """Name where patches sit, and whose they are."""
    for place, values in sorted(patches.items(), key=lambda item: str(item[0])):
        inner = values.values() if isinstance(values, Mapping) else values
        owners = sorted({name_of(each) for each in inner}) if isinstance(inner, Iterable) else [name_of(inner)]
        yield f"{place}: {', '.join(owners)}" if owners else str(place)


def _changes_blocks(function: Any) -> bool:
    """Tell from a function's code, before it is called, that it will ask for a model with other blocks."""
    pending = [getattr(getattr(function, "func", function), "__code__", None)]
    while pending:
        code = pending.pop()
        if code is None:
            continue
        if _MARKS & {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))}:
            return True
        pending += [each for each in code.co_consts if hasattr(each, "co_names")]
    return False


def is_empty(value: object) -> bool:
    """Whether an option or a part of conditioning is there in name alone."""
    return value is None or value is False or (isinstance(value, (Mapping, Sequence)) and not value)
