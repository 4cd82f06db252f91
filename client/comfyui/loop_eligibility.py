"""Which jobs the workers' own loop can do whole, and why others cannot.

The loop takes weights, embeddings, noise and sigmas. So a job is eligible only where the model is provably no more than
its weights, and the conditioning no more than one text: whatever else they carry runs step by step, in ComfyUI's loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from xditd.ipc.limits import MAX_BATCH, MAX_STEPS

EULER = "euler"
_PLAIN_CONDITION = {"cross_attn", "guidance", "pooled_output", "prompt_type", "strength", "uuid"}
_MODEL_CONDS = {"c_crossattn", "guidance", "y"}


def why_stepwise(
    *,
    sampler: str,
    cfg: float,
    has_mask: bool,
    sigmas: Sequence[float],
    positive: Sequence[Mapping[str, Any]],
    negative: Sequence[Mapping[str, Any]],
    has_guidance: bool,
    unlike_made: str | None,
    latent_shape: Sequence[int],
) -> str | None:
    """Say why ComfyUI's own loop has to run, or nothing where the workers' loop gives the same latents.

    ``positive`` and ``negative`` are the parts of the conditioning with all that is attached to them. ``has_guidance``
    tells that the model is distilled for guidance, ``unlike_made`` says what was done to it since it was loaded.
    """
    if unlike_made is not None:
        return unlike_made
    if sampler != EULER:
        return f"the workers' loop has the sampler euler, not {sampler}"
    if cfg != 1.0:
        return f"cfg {cfg:g} needs two predictions a step"
    if has_mask:
        return "the latent has a mask"
    if len(latent_shape) != 4 or any(side % 2 for side in latent_shape[-2:]):
        return "the image's sides are not multiples of 16"
    return (
        _why_not_schedule(sigmas)
        or _why_not_condition(positive, negative, has_guidance)
        or (f"a batch of {latent_shape[0]} is more than {MAX_BATCH}" if latent_shape[0] > MAX_BATCH else None)
    )


def _why_not_schedule(sigmas: Sequence[float]) -> str | None:
    if len(sigmas) < 2 or sigmas[-1] != 0.0 or sigmas[0] > 1.0:
        return "the schedule does not fall from at most 1 to 0"
    if len(sigmas) - 1 > MAX_STEPS:
        return f"{len(sigmas) - 1} steps are more than {MAX_STEPS}"
    if any(later >= earlier for earlier, later in itertools.pairwise(sigmas)):
        return "the schedule does not fall from step to step"
    return None


def _why_not_condition(
    positive: Sequence[Mapping[str, Any]], negative: Sequence[Mapping[str, Any]], has_guidance: bool
) -> str | None:
    if len(positive) != 1:
        return f"the positive conditioning has {len(positive)} parts"
    for name, parts in (("positive", positive), ("negative", negative)):
        for part in parts:  # of the negative one too: ComfyUI carries its areas over to the positive
            special = sorted(
                key for key in part.keys() - _PLAIN_CONDITION if key != "model_conds" and part[key] is not None
            )
            special += sorted(part.get("model_conds", {}).keys() - _MODEL_CONDS)
            if special:
                return f"the {name} conditioning has {', '.join(special)}"
    if positive[0].get("strength", 1.0) != 1.0:
        return "the conditioning has a strength"
    if positive[0].get("cross_attn") is None:
        return "the conditioning has no text embeddings"
    if has_guidance and positive[0].get("guidance", 0.0) is None:
        return "guidance is switched off (FluxDisableGuidance)"
    return None
