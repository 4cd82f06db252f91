"""What a remote forward cannot honour: found before anything runs, and named with what to do about it.

A node that patches the model in Python would otherwise be ignored in silence, and the picture would be another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xditd.ipc.errors import Unsupported
from xditd.ipc.name_lists import listed

_OPTIONS = {
    "patches": "a patch of the model's blocks",
    "patches_replace": "a replacement of the model's blocks",
    "optimized_attention_override": "an attention override",
    "rope_options": "a change of RoPE (position embeddings)",
}


def check_forward(
    transformer_options: Mapping[str, Any],
    *,
    control: object | None = None,
    ref_latents: object | None = None,
    attention_mask: object | None = None,
) -> None:
    """Refuse a forward that carries what lives as Python code, or another model, inside ComfyUI.

    Raises:
        Unsupported: names each of them.
    """
    found = list(_faults(transformer_options, control, ref_latents, attention_mask))
    if found:
        raise Unsupported(
            f"XDiT: {'; '.join(found)} cannot run in the workers, which hold the model; remove the node, or use the "
            "stock model without XDiT"
        )


def _faults(
    options: Mapping[str, Any], control: object | None, ref_latents: object | None, attention_mask: object | None
) -> Iterator[str]:
    if control:
        yield "ControlNet"
    if ref_latents is not None:
        yield "reference latents (FLUX.1 Kontext)"
    if attention_mask is not None:
        yield "an attention mask in the conditioning (Apply Style Model)"
    for key, what in _OPTIONS.items():
        value = options.get(key)
        if value:
            names = listed(sorted(map(str, value))) if isinstance(value, Mapping) else ""
            yield f"{what} ({names})" if names else what
