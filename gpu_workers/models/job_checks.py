"""What a job's numbers and tensors must be before anything is launched: each fault is refused by name and value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from xditd.gpu_workers.models.skeletons import Skeleton
from xditd.ipc.errors import BadRequest
from xditd.ipc.limits import MAX_SIDE_PIXELS, MAX_STEPS, SIDE_MULTIPLE_PIXELS

Bounded = tuple[torch.Tensor | None, str, float, float]
"""A tensor or nothing, its name, and the range of its values."""


def check_generate(
    *,
    height: int,
    width: int,
    steps: int,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | None = None,
) -> None:
    """Check the numbers of a ``generate`` job; this needs no tensor, so that it can run before any is mapped.

    Raises:
        BadRequest: names the field, its value and what would do.
    """
    check_sides(height, width, SIDE_MULTIPLE_PIXELS)
    if not 1 <= steps <= MAX_STEPS:
        raise BadRequest(f"steps {steps}: use 1 to {MAX_STEPS}")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise BadRequest(f"guidance_scale {guidance_scale}: use a finite number, such as 3.5")
    if sigmas is None:
        return
    if len(sigmas) != steps:
        raise BadRequest(f"{len(sigmas)} sigmas for {steps} steps: give one for each step, without the final 0")
    wrong = [sigma for sigma in sigmas if not 0.0 < sigma <= 1.0]  # NaN fails this too
    if wrong:
        raise BadRequest(f"sigma {wrong[0]}: every sigma lies above 0 and at most at 1")
    if any(later >= earlier for earlier, later in pairwise(sigmas)):
        raise BadRequest("sigmas do not fall from step to step")


def check_sides(height: int, width: int, multiple: int) -> None:
    """Raise ``BadRequest`` if a side in pixels is no multiple, or beyond the limit."""
    for name, side in (("height", height), ("width", width)):
        if not 0 < side <= MAX_SIDE_PIXELS or side % multiple:
            raise BadRequest(f"{name} {side}: use a multiple of {multiple} up to {MAX_SIDE_PIXELS} pixels")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``BadRequest`` if ``tensor`` has another shape."""
    if tuple(tensor.shape) != shape:
        raise BadRequest(f"{name}: shape is {list(tensor.shape)}, use {list(shape)}")


def prepare(skeleton: Skeleton, *, checked: Sequence[Bounded] = (), **tensors: torch.Tensor) -> list[torch.Tensor]:
    """Move tensors to the skeleton's device and dtype, and refuse values that are not finite or out of bounds.

    All verdicts are read together: one wait for the GPU, before the model is launched.
    """
    names: list[str] = []
    verdicts: list[torch.Tensor] = []
    moved: list[torch.Tensor] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise BadRequest(f"{name}: dtype is {tensor.dtype}, use a floating dtype")
        tensor = tensor.to(skeleton.device, skeleton.dtype)
        moved.append(tensor)
        names.append(f"{name}: some values are not finite in {skeleton.dtype}")
        verdicts.append(tensor.isfinite().all())
    for bounded, name, low, high in checked:
        if bounded is not None:
            names.append(f"{name}: some values are not finite numbers from {low} to {high}")
            verdicts.append((bounded.isfinite() & (bounded >= low) & (bounded <= high)).all())
    place = skeleton.device.type
    read = iter(torch.stack([verdict for verdict in verdicts if verdict.device.type == place]).tolist())
    for fault, verdict in zip(names, verdicts, strict=True):
        if not (next(read) if verdict.device.type == place else bool(verdict)):  # a number's is on the host already
            raise BadRequest(fault)
    return moved
