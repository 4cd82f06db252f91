"""Check the arguments of jobs before anything is sent, by the facts of the components.

Only cheap checks are here. The workers, which have the model, check for NaN and for what a family cannot run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ArgumentFacts, LatentFacts, TransformerFacts, VaeFacts
from xditd.ipc.name_lists import listed
from xditd.ipc.suggestions import did_you_mean

if TYPE_CHECKING:
    import torch

FLOAT_DTYPES: Final = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")
LATENT_AXES: Final = "(batch, channels, height, width)"
VIDEO_LATENT_AXES: Final = "(batch, channels, frames, height, width)"


def shape_text(tensor: torch.Tensor) -> str:
    return "(" + ", ".join(str(side) for side in tensor.shape) + ")"


def check_tensor(name: str, tensor: torch.Tensor, axes: str, rank: int) -> None:
    """Refuse anything but a floating-point tensor with ``rank`` dimensions, none of them empty."""
    dtype = getattr(tensor, "dtype", None)
    if dtype is None or not hasattr(tensor, "data_ptr"):
        raise BadRequest(f"{name}: a torch tensor {axes} is needed, not {type(tensor).__name__}")
    if str(dtype) not in FLOAT_DTYPES:
        known = ", ".join(text.removeprefix("torch.") for text in FLOAT_DTYPES)
        found = str(dtype).removeprefix("torch.")
        raise BadRequest(f"{name}: dtype {found} cannot be used; convert it to one of {known}")
    if tensor.ndim != rank or 0 in tensor.shape:
        raise BadRequest(f"{name}: shape {shape_text(tensor)} instead of {axes}, every side at least 1")


def check_conditioning(given: Mapping[str, Any], listed_facts: Sequence[ArgumentFacts]) -> int:
    """Check the conditioning of a generation against what its transformer takes; returns the batch size."""
    if not isinstance(given, Mapping):
        raise BadRequest(
            f"conditioning: a dict by name is needed, not {type(given).__name__}; {_expected_text(listed_facts)}"
        )
    known = {facts.name for facts in listed_facts}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise BadRequest(f"conditioning: {listed(unknown)} is not known here; {_expected_text(listed_facts)}")
    missing = [facts.name for facts in listed_facts if facts.is_needed and given.get(facts.name) is None]
    if missing:
        raise BadRequest(f"conditioning: lacks {listed(missing)}; {_expected_text(listed_facts)}")
    sizes: dict[str, tuple[int, str]] = {}
    for facts in listed_facts:
        value = given.get(facts.name)
        if value is None:
            continue
        if not facts.is_list:
            _check_sides(facts.name, value, facts, sizes)
            continue
        if not isinstance(value, (list, tuple)) or not value:
            each = "" if facts.is_shared else ", one for each image"
            raise BadRequest(f"{facts.name}: a list of tensors {axes_text(facts)} is needed{each}")
        for number, each in enumerate(value):
            _check_sides(f"{facts.name}[{number}]", each, facts, {})
        if not facts.is_shared:
            check_same_size("batch", len(value), facts.name, sizes)
    batch = sizes["batch"][0] if "batch" in sizes else 1
    if batch > limits.MAX_BATCH:
        name = sizes["batch"][1]
        raise BadRequest(f"{name}: batch {batch}, at most {limits.MAX_BATCH}; split it into several jobs")
    return batch


def axes_text(facts: ArgumentFacts) -> str:
    """Format the shape of an argument: ``(batch, tokens, 4096)``."""
    return "(" + ", ".join(str(side) for side in facts.shape) + ")"


def _expected_text(listed_facts: Sequence[ArgumentFacts]) -> str:
    each = [f"{facts.name} {'a list of ' if facts.is_list else ''}{axes_text(facts)}" for facts in listed_facts]
    return f"this transformer takes {', '.join(each)}"


def _check_sides(name: str, tensor: torch.Tensor, facts: ArgumentFacts, sizes: dict[str, tuple[int, str]]) -> None:
    check_tensor(name, tensor, axes_text(facts), len(facts.shape))
    for expected, found in zip(facts.shape, tensor.shape, strict=True):
        if isinstance(expected, str):
            check_same_size(expected, found, name, sizes)
        elif found != expected:
            raise BadRequest(f"{name}: shape {shape_text(tensor)} instead of {axes_text(facts)}")


def check_same_size(side: str, found: int, name: str, sizes: dict[str, tuple[int, str]]) -> None:
    """Refuse a size that differs from that of the same dimension in another argument."""
    expected, where = sizes.setdefault(side, (found, name))
    if found != expected:
        remedy = "; give one row for each prompt" if side == "batch" else ""
        raise BadRequest(f"{name}: {side} {found}, but {where} has {side} {expected}{remedy}")


def check_size(height: int, width: int, latents: LatentFacts) -> None:
    """Check an image size in pixels."""
    multiple = latents.pixels * latents.multiple
    for name, side in (("height", height), ("width", width)):
        check_whole(name, side, multiple, limits.MAX_SIDE_PIXELS)
        if side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise BadRequest(f"{name}: {side} is not a multiple of {multiple} pixels; {near} is near")


def check_frames(frames: int, latents: LatentFacts) -> None:
    """Check the frames of a video; of an image, 1."""
    check_whole("frames", frames, 1, limits.MAX_FRAMES)
    latents.check_frames(frames)


def check_steps(steps: int) -> None:
    check_whole("steps", steps, 1, limits.MAX_STEPS)


def check_whole(name: str, value: int, low: int, high: int) -> None:
    """Refuse anything but an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{name}: {value!r} is not a whole number from {low} to {high}")


def check_guidance(name: str, value: float) -> float:
    """Check a guidance scale; returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= limits.MAX_GUIDANCE:
        raise BadRequest(f"{name}: {value!r} is not a number from 0 to {limits.MAX_GUIDANCE:g}")
    return float(value)


def check_step_cache(value: float, facts: TransformerFacts) -> float:
    """Check the threshold of the step cache; returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise BadRequest(f"step_cache: {value!r} is not a number from 0 (no step is skipped) to 1; start with 0.08")
    if value and not facts.has_step_cache:
        raise BadRequest(f"step_cache: {value!r} is given, but this transformer has no step cache; leave it at 0")
    return float(value)


def check_variant(value: str, facts: TransformerFacts) -> str:
    """Check the variant of a transformer's computation."""
    if value not in facts.variants:
        raise BadRequest(f"variant: {value!r} is not one of {', '.join(map(repr, facts.variants))}")
    return value


def check_options(options: Mapping[str, bool | int | float] | None, facts: TransformerFacts) -> dict[str, Any]:
    """Check names and types of a family's options; the workers check their values."""
    if options is not None and not isinstance(options, Mapping):
        raise BadRequest(f"options: {options!r:.100} is of type {type(options).__name__}, use a dict by name")
    checked = {} if options is None else dict(options)
    for name, value in checked.items():
        if name not in facts.options:
            known = f"give one of {', '.join(facts.options)}" if facts.options else "this transformer has none"
            near = did_you_mean(str(name), facts.options)
            raise BadRequest(f"options: {name}={value!r} is not known; {known}{near}")
        if not isinstance(value, (bool, int, float)) or not abs(value) < math.inf:
            raise BadRequest(f"options: {name}={value!r} is not a finite number or a boolean")
    return checked


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


def check_foreseen(foreseen: Mapping[str, Sequence[float] | torch.Tensor] | None) -> dict[str, tuple[float, ...]]:
    """Check the values that arguments will have in later calls. They need no order: samplers may use some twice."""
    if foreseen is not None and not isinstance(foreseen, Mapping):
        raise BadRequest(f"foreseen: {foreseen!r:.100} is of type {type(foreseen).__name__}, use a dict by name")
    found = (
        {} if foreseen is None else {name: floats_of(f"foreseen.{name}", values) for name, values in foreseen.items()}
    )
    for name, values in found.items():
        if len(values) > limits.MAX_STEPS:
            raise BadRequest(f"foreseen.{name}: {len(values)} values, at most {limits.MAX_STEPS} can be foreseen")
    return found


def check_latents(name: str, latents: torch.Tensor, facts: LatentFacts, *, batch: int | None = None) -> None:
    """Check latents (batch, channels, height / pixels, width / pixels), of videos with frames before the height."""
    is_video = bool(facts.frames) and getattr(latents, "ndim", 0) == 5
    check_tensor(name, latents, *((VIDEO_LATENT_AXES, 5) if is_video else (LATENT_AXES, 4)))
    if latents.shape[1] != facts.channels:
        raise BadRequest(f"{name}: {latents.shape[1]} channels instead of {facts.channels}; give them unpacked")
    if batch is not None and latents.shape[0] != batch:
        raise BadRequest(f"{name}: batch {latents.shape[0]}, but the prompts have batch {batch}")
    for axis, side in (("height", latents.shape[-2]), ("width", latents.shape[-1])):
        if side * facts.pixels > limits.MAX_SIDE_PIXELS:
            raise BadRequest(
                f"{name}: latent {axis} {side} stands for {side * facts.pixels} pixels, "
                f"at most {limits.MAX_SIDE_PIXELS}"
            )
    if latents.shape[0] > limits.MAX_BATCH:
        raise BadRequest(f"{name}: batch {latents.shape[0]}, at most {limits.MAX_BATCH}; split it into several jobs")


def check_noise(noise: torch.Tensor, batch: int, height: int, width: int, facts: LatentFacts, frames: int = 1) -> None:
    """Check the shape of given noise. That of a video may have latent frames before it, which the workers count."""
    check_latents("noise", noise, facts, batch=batch)
    expected = facts.shape(batch, height, width, frames)
    found = tuple(noise.shape)
    if facts.frames and found[2] > expected[2]:
        found = (*found[:2], expected[2], *found[3:])
    if found != expected:
        raise BadRequest(f"noise: shape {shape_text(noise)} instead of {expected} for {width}x{height} pixels")


def check_image(image: torch.Tensor, facts: VaeFacts) -> None:
    """Check an image (batch, channels, height, width): its sides must be multiples of a latent's pixels.

    A video has frames before the height.
    """
    if facts.latents.frames and getattr(image, "ndim", 0) == 5:
        check_tensor("image", image, "(batch, channels, frames, height, width) in [-1, 1]", 5)
        facts.latents.check_frames(image.shape[2])
    else:
        check_tensor("image", image, "(batch, channels, height, width) in [-1, 1]", 4)
    batch, channels, *_, height, width = image.shape
    if channels != facts.image_channels:
        raise BadRequest(f"image: {channels} channels instead of {facts.image_channels}")
    if batch > limits.MAX_BATCH:
        raise BadRequest(f"image: batch {batch}, at most {limits.MAX_BATCH}; split it into several jobs")
    pixels = facts.latents.pixels
    for name, side in (("height", height), ("width", width)):
        if side % pixels or side > limits.MAX_SIDE_PIXELS:
            raise BadRequest(f"image: {name} {side} is not a multiple of {pixels} up to {limits.MAX_SIDE_PIXELS}")


def floats_of(name: str, values: Sequence[float] | torch.Tensor) -> tuple[float, ...]:
    """Convert a flat sequence of finite numbers."""
    try:
        plain = values.tolist() if hasattr(values, "tolist") else values
        found = tuple(float(value) for value in (plain if isinstance(plain, Sequence) else [plain]))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise BadRequest(f"{name}: a flat sequence of numbers is needed") from None
    for index, value in enumerate(found):
        if not math.isfinite(value):
            raise BadRequest(f"{name}[{index}]: {value!r} is not finite")
    return found
