"""Checks on what a caller hands to a job: the thing, its value and the remedy, before anything is sent.

Only what is cheap and certain is checked here. NaN, context widths and what a family can run are the
workers' to judge: they have the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, get_args

from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.requests import Variant

if TYPE_CHECKING:
    import torch

LATENT_CHANNELS: Final = 16
PIXELS_PER_LATENT: Final = 8
SIDE_MULTIPLE: Final = 16
"""Eight pixels a latent, two latents a token."""

FLOAT_DTYPES: Final = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")


def shape_text(tensor: torch.Tensor) -> str:
    return "(" + ", ".join(str(side) for side in tensor.shape) + ")"


def check_tensor(name: str, tensor: torch.Tensor, axes: str, rank: int) -> None:
    """Refuse what is no floating-point tensor with ``rank`` dimensions, none of them empty."""
    dtype = getattr(tensor, "dtype", None)
    if dtype is None or not hasattr(tensor, "data_ptr"):
        raise BadRequest(f"{name}: a torch tensor {axes} is needed, not {type(tensor).__name__}")
    if str(dtype) not in FLOAT_DTYPES:
        known = ", ".join(text.removeprefix("torch.") for text in FLOAT_DTYPES)
        found = str(dtype).removeprefix("torch.")
        raise BadRequest(f"{name}: dtype {found} cannot be used; convert it to one of {known}")
    if tensor.ndim != rank or 0 in tensor.shape:
        raise BadRequest(f"{name}: shape {shape_text(tensor)} instead of {axes}, every side at least 1")


def check_embeds(prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor) -> int:
    """Check the text conditioning; returns the batch size."""
    check_tensor("prompt_embeds", prompt_embeds, "(batch, text tokens, context)", 3)
    check_tensor("pooled_prompt_embeds", pooled_prompt_embeds, "(batch, pooled)", 2)
    batch = prompt_embeds.shape[0]
    if pooled_prompt_embeds.shape[0] != batch:
        raise BadRequest(
            f"pooled_prompt_embeds: batch {pooled_prompt_embeds.shape[0]}, but prompt_embeds has batch {batch}; "
            "give one row for each prompt"
        )
    if batch > limits.MAX_BATCH:
        raise BadRequest(f"prompt_embeds: batch {batch}, at most {limits.MAX_BATCH}; split it into several jobs")
    return batch


def check_size(height: int, width: int) -> None:
    """Check an image size in pixels."""
    for name, side in (("height", height), ("width", width)):
        check_whole(name, side, SIDE_MULTIPLE, limits.MAX_SIDE_PIXELS)
        if side % SIDE_MULTIPLE:
            near = max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE)
            raise BadRequest(f"{name}: {side} is not a multiple of {SIDE_MULTIPLE} pixels; {near} is near")


def check_steps(steps: int) -> None:
    check_whole("steps", steps, 1, limits.MAX_STEPS)


def check_whole(name: str, value: int, low: int, high: int) -> None:
    """Refuse what is not an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{name}: {value!r} is not a whole number from {low} to {high}")


def check_guidance(name: str, value: float) -> float:
    """Check a guidance scale; returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1000.0:
        raise BadRequest(f"{name}: {value!r} is not a number from 0 to 1000")
    return float(value)


def check_step_cache(value: float) -> float:
    """Check the threshold of the step cache; returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise BadRequest(f"step_cache: {value!r} is not a number from 0 (no step is spared) to 1; 0.08 is a start")
    return float(value)


def check_variant(value: str) -> Variant:
    """Check whose rounding a job follows."""
    known = get_args(Variant)
    if value not in known:
        raise BadRequest(f"variant: {value!r} is not one of {', '.join(map(repr, known))}")
    return value  # type: ignore[return-value]


def check_sigmas(sigmas: Sequence[float] | torch.Tensor, steps: int) -> tuple[float, ...]:
    """Check a noise schedule: ``steps`` descending values in (0, 1], the final 0 implied."""
    values = floats_of("sigmas", sigmas)
    if len(values) == steps + 1 and values[-1] == 0.0:
        raise BadRequest(f"sigmas: {len(values)} values, the last one 0; leave the final 0 out, it is implied")
    if len(values) != steps:
        raise BadRequest(f"sigmas: {len(values)} values for {steps} steps; give one for each step, without the final 0")
    for index, value in enumerate(values):
        if not 0.0 < value <= 1.0:
            raise BadRequest(f"sigmas[{index}]: {value!r} is not in (0, 1]")
    for index, (earlier, later) in enumerate(itertools.pairwise(values)):
        if later >= earlier:
            raise BadRequest(f"sigmas[{index + 1}]: {later!r} does not descend from {earlier!r}")
    return values


def check_foreseen(sigmas: Sequence[float] | torch.Tensor | None) -> tuple[float, ...]:
    """Check the sigmas of forwards to come: any order, as samplers may ask for some of them twice."""
    values = () if sigmas is None else floats_of("sigmas", sigmas)
    if len(values) > limits.MAX_STEPS:
        raise BadRequest(f"sigmas: {len(values)} values, at most {limits.MAX_STEPS} can be foreseen")
    for index, value in enumerate(values):
        if not 0.0 <= value <= 1.0:
            raise BadRequest(f"sigmas[{index}]: {value!r} is not in [0, 1]")
    return values


def check_timestep(timestep: float | Sequence[float] | torch.Tensor, batch: int) -> tuple[float, ...]:
    """Check the sigmas of one forward; a single one serves the whole batch."""
    values = (float(timestep),) if isinstance(timestep, (int, float)) else floats_of("timestep", timestep)
    if len(values) == 1:
        values = values * batch
    if len(values) != batch:
        raise BadRequest(f"timestep: {len(values)} values for a batch of {batch}; give one, or one for each image")
    for value in values:
        if not 0.0 <= value <= 1.0:
            raise BadRequest(f"timestep: {value!r} is not in [0, 1]; give sigmas, not the 0 to 1000 of a scheduler")
    return values


def check_latents(name: str, latents: torch.Tensor, *, batch: int | None = None) -> None:
    """Check latents (batch, 16, height/8, width/8)."""
    check_tensor(name, latents, f"(batch, {LATENT_CHANNELS}, height/8, width/8)", 4)
    if latents.shape[1] != LATENT_CHANNELS:
        raise BadRequest(f"{name}: {latents.shape[1]} channels instead of {LATENT_CHANNELS}; give them unpacked")
    if batch is not None and latents.shape[0] != batch:
        raise BadRequest(f"{name}: batch {latents.shape[0]}, but the prompts have batch {batch}")
    if latents.shape[0] > limits.MAX_BATCH:
        raise BadRequest(f"{name}: batch {latents.shape[0]}, at most {limits.MAX_BATCH}; split it into several jobs")


def check_shares(batch: int, given: Sequence[int]) -> list[int]:
    """Share a batch out evenly among conditionings of so many rows each; returns the images of each.

    Raises:
        BadRequest: it does not divide, or a conditioning has neither one row nor as many as its share.
    """
    if not given or batch % len(given):
        raise BadRequest(f"latents: a batch of {batch} cannot be shared out evenly among {len(given)} conditionings")
    share = batch // len(given)
    for rows in given:
        if rows not in (1, share):
            raise BadRequest(
                f"conditioning: {rows} rows for {share} of the {batch} latents; give one row, or one for each of them"
            )
    return [share] * len(given)


def check_even_latents(name: str, latents: torch.Tensor) -> None:
    """Refuse latents that do not fold into tokens of two by two."""
    for axis, side in (("height", latents.shape[2]), ("width", latents.shape[3])):
        if side % 2:
            raise BadRequest(f"{name}: latent {axis} {side} is odd; images have multiples of {SIDE_MULTIPLE} pixels")


def check_noise(noise: torch.Tensor, batch: int, height: int, width: int) -> None:
    """Check ready noise against the size of the job."""
    check_latents("noise", noise, batch=batch)
    expected = (batch, LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    if tuple(noise.shape) != expected:
        raise BadRequest(f"noise: shape {shape_text(noise)} instead of {expected} for {width}x{height} pixels")


def check_image(image: torch.Tensor) -> None:
    """Check an image (batch, 3, height, width) whose sides divide into latents."""
    check_tensor("image", image, "(batch, 3, height, width) in [-1, 1]", 4)
    batch, channels, height, width = image.shape
    if channels != 3:
        raise BadRequest(f"image: {channels} channels instead of 3")
    if batch > limits.MAX_BATCH:
        raise BadRequest(f"image: batch {batch}, at most {limits.MAX_BATCH}; split it into several jobs")
    for name, side in (("height", height), ("width", width)):
        if side % PIXELS_PER_LATENT or side > limits.MAX_SIDE_PIXELS:
            raise BadRequest(
                f"image: {name} {side} is not a multiple of {PIXELS_PER_LATENT} up to {limits.MAX_SIDE_PIXELS}"
            )


def floats_of(name: str, values: Sequence[float] | torch.Tensor) -> tuple[float, ...]:
    """Read a flat sequence of finite numbers."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    try:
        found = tuple(float(value) for value in (plain if isinstance(plain, Sequence) else [plain]))
    except (TypeError, ValueError):
        raise BadRequest(f"{name}: a flat sequence of numbers is needed") from None
    for index, value in enumerate(found):
        if not math.isfinite(value):
            raise BadRequest(f"{name}[{index}]: {value!r} is not finite")
    return found
