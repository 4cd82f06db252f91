"""Which jobs the workers' own loop can do whole, and why others cannot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from xditd.ipc.name_lists import listed

EULER = "euler"
_PLAIN_CONDITION = {
    "cross_attn", "guidance", "model_conds", "pooled_output", "prompt_type", "strength", "uuid", "default",
}  # fmt: skip
_LOCAL_OPTIONS = {
    "denoise_mask_function": "a denoise mask function (Differential Diffusion)",
    "model_function_wrapper": "a model function wrapper",
    "sampler_calc_cond_batch_function": "a conditioning batch function",
    "sampler_cfg_function": "a CFG function",
    "sampler_post_cfg_function": "a post-CFG function",
    "sampler_pre_cfg_function": "a pre-CFG function",
}
STEPWISE_WRAPPERS = ("sampler_sample", "predict_noise", "calc_cond_batch", "apply_model", "diffusion_model")


def why_stepwise(
    *,
    sampler: str,
    cfg: float,
    has_mask: bool,
    sigmas: Sequence[float],
    conditions: Sequence[Mapping[str, Any]],
    model_options: Mapping[str, Any],
    foreign_wrappers: Sequence[str],
    latent_sides: tuple[int, int],
) -> str | None:
    """Say why ComfyUI's own loop has to run, or nothing where the workers' loop gives the same latents."""
    if sampler != EULER:
        return f"the workers' loop has the sampler euler, not {sampler}"
    if cfg != 1.0:
        return f"cfg {cfg:g} needs two predictions a step"
    if has_mask:
        return "the latent has a mask"
    if len(sigmas) < 2 or sigmas[-1] != 0.0 or sigmas[0] > 1.0:
        return "the schedule does not fall from at most 1 to 0"
    if any(later >= earlier for earlier, later in itertools.pairwise(sigmas)):
        return "the schedule does not fall from step to step"
    if any(side % 2 for side in latent_sides):
        return "the image's sides are not multiples of 16"
    if len(conditions) != 1:
        return f"the positive conditioning has {len(conditions)} parts"
    special = sorted(key for key, value in conditions[0].items() if key not in _PLAIN_CONDITION and value is not None)
    if special:
        return f"the conditioning has {listed(special)}"
    if conditions[0].get("strength", 1.0) != 1.0:
        return "the conditioning has a strength"
    for key, what in _LOCAL_OPTIONS.items():
        if model_options.get(key):
            return f"the model has {what}"
    if foreign_wrappers:
        return f"other nodes wrap the model ({listed(foreign_wrappers)})"
    return None
