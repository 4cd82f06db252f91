"""Decide whether the workers' own loop can run a whole job of XDiT KSampler, and say why not.

The workers' loop takes weights, embeddings, noise and sigmas. So a job is eligible only if nothing but weights defines
its model, and its conditioning is one text. All others run step by step in ComfyUI's loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from xditd.ipc.limits import MAX_BATCH, MAX_STEPS

if TYPE_CHECKING:
    from xditd.client.comfyui.families.adapter import ModelAdapter

EULER: Final = "euler"
_COMMON_KEYS: Final = frozenset({"model_conds", "prompt_type", "strength", "uuid"})
"""Keys that any CONDITIONING has, or that are checked one by one below."""


def why_stepwise(
    *,
    sampler: str,
    cfg: float,
    has_mask: bool,
    sigmas: Sequence[float],
    positive: Sequence[Mapping[str, Any]],
    negative: Sequence[Mapping[str, Any]],
    family: ModelAdapter,
    model_change: str | None,
    latent_shape: Sequence[int],
    pixels_per_latent: int,
) -> str | None:
    """Return why ComfyUI's own loop has to run, or None if the workers' loop gives the same latents.

    ``positive`` and ``negative`` are parts of conditioning with all their options (``parts_of``); ``model_change`` is
    from ``why_model_changed``.
    """
    if model_change is not None:
        return model_change
    if sampler != EULER:
        return f"the workers' loop has the sampler euler, not {sampler}"
    if cfg != 1.0:
        return f"cfg {cfg:g} needs two predictions a step"
    if has_mask:
        return "the latent has a mask"
    if tuple(latent_shape[2:-2]) != ((1,) if family.has_frame_axis else ()):
        return "the latent has frames"
    if any(side % family.multiple for side in latent_shape[-2:]):
        return f"the image's sides are not multiples of {family.multiple * pixels_per_latent}"
    return (
        _why_not_schedule(sigmas)
        or _why_not_condition(positive, negative, family)
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
    positive: Sequence[Mapping[str, Any]], negative: Sequence[Mapping[str, Any]], family: ModelAdapter
) -> str | None:
    if len(positive) != 1:
        return f"the positive conditioning has {len(positive)} parts"
    for name, parts in (("positive", positive), ("negative", negative)):
        for part in parts:  # the negative ones too: ComfyUI copies their areas to the positive conditioning
            special = sorted(key for key in part.keys() - _COMMON_KEYS - family.loop_keys if part[key] is not None)
            special += sorted(part.get("model_conds", {}).keys() - family.loop_conds)
            if special:
                return f"the {name} conditioning has {', '.join(special)}"
    if positive[0].get("strength", 1.0) != 1.0:
        return "the conditioning has a strength"
    if positive[0].get("cross_attn") is None:
        return "the conditioning has no text embeddings"
    return next(itertools.chain(family.condition_faults(positive[0]), family.loop_faults(positive[0])), None)
