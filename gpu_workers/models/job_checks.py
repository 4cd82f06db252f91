"""Checks of a job's numbers and tensors before it runs; errors name the field and its value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from xditd.gpu_workers.models.finite import check_finite
from xditd.gpu_workers.models.operations import Model
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.limits import MAX_BATCH, MAX_SIDE_PIXELS, MAX_STEPS


def check_schedule(steps: int, sigmas: Sequence[float] | None) -> None:
    """Check the steps of a generation.

    Raises:
        BadRequest: names the field, its value and what is accepted.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise BadRequest(f"steps {steps}: use 1 to {MAX_STEPS}")
    if sigmas is None:
        return
    if len(sigmas) != steps:
        raise BadRequest(f"{len(sigmas)} sigmas for {steps} steps: give one for each step, without the final 0")
    wrong = [sigma for sigma in sigmas if not 0.0 < sigma <= 1.0]  # NaN fails this too
    if wrong:
        raise BadRequest(f"sigma {wrong[0]}: every sigma lies above 0 and at most at 1")
    if any(later >= earlier for earlier, later in pairwise(sigmas)):
        raise BadRequest("sigmas do not decrease from step to step; give them in decreasing order")


def check_sides(height: int, width: int, multiple: int) -> None:
    """Raise ``BadRequest`` if a side in pixels is not a multiple of ``multiple``, or beyond the limit."""
    for name, side in (("height", height), ("width", width)):
        if not 0 < side <= MAX_SIDE_PIXELS or side % multiple:
            raise BadRequest(f"{name} {side}: use a multiple of {multiple} up to {MAX_SIDE_PIXELS} pixels")


def check_shape(name: str, tensor: object, shape: Sequence[int | None]) -> None:
    """Raise ``BadRequest`` if ``tensor`` is no tensor of this shape; ``None`` is any size above 0."""
    if not isinstance(tensor, torch.Tensor):
        raise BadRequest(f"{name}: {type(tensor).__name__} where a tensor is needed, {_shape_text(shape)}")
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(
        side == 0 or (wanted is not None and side != wanted) for side, wanted in zip(found, shape, strict=True)
    ):
        raise BadRequest(f"{name}: shape is {list(found)}, use {_shape_text(shape)}")


def check_batch(name: str, batch: int) -> None:
    """Raise ``BadRequest`` if there are no rows, or too many for one job."""
    if not 1 <= batch <= MAX_BATCH:
        raise BadRequest(f"{name}: a batch of {batch}, use 1 to {MAX_BATCH}")


def check_tensor(name: str, tensor: object, shape: Sequence[int | None], dtype: torch.dtype | None = None) -> None:
    """Check the shape and dtype of an argument, which is not cast; ``None`` is any floating dtype.

    Raises:
        BadRequest: names the argument, its shape or dtype, and what is accepted.
    """
    check_shape(name, tensor, shape)
    assert isinstance(tensor, torch.Tensor)
    if dtype is not None and tensor.dtype != dtype:
        raise BadRequest(f"{name}: dtype is {_name(tensor.dtype)}, use {_name(dtype)}, that of the weights")
    if not tensor.is_floating_point():
        raise BadRequest(f"{name}: dtype is {_name(tensor.dtype)}, use a floating dtype")
    if tensor.itemsize == 1:  # torch cannot compute in eight bits: the forward would fail
        raise BadRequest(f"{name}: dtype is {_name(tensor.dtype)}, use float32, or a floating dtype of 16 bits")


def check_output(name: str, dtype: str) -> None:
    """Raise ``BadRequest`` if ``dtype``, a name of the protocol, cannot hold results: integers and eight bits."""
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise BadRequest(f"{name}: dtype is {dtype}, use float32, or a floating dtype of 16 bits")


def check_known(name: str, known: Mapping[str, Sequence[float]], low: float, high: float, remedy: str) -> None:
    """Check the values of an argument if the host knows them.

    Raises:
        BadRequest: one lies outside ``low`` to ``high``; names it and the ``remedy``.
    """
    for value in known.get(name, ()):
        if not low <= value <= high:
            raise BadRequest(f"{name}: {value:g} is not a number from {low:g} to {high:g}; {remedy}")


def check_latent_size(latents: torch.Tensor, pixels: int) -> None:
    """Check the batch, and the sides, the last two dimensions, of latents for a decode.

    ``pixels`` are those on a side for each latent.
    """
    if max(latents.shape[-2:]) * pixels > MAX_SIDE_PIXELS or latents.shape[0] > MAX_BATCH:
        raise BadRequest(
            f"latents are {list(latents.shape)}: use a batch up to {MAX_BATCH}, {MAX_SIDE_PIXELS} pixels on a side"
        )


def check_split(layout: ParallelLayout, text_tokens: int, image_tokens: int) -> None:
    """Raise ``Unsupported`` if there are fewer tokens than ranks that share a sequence."""
    ranks = layout.degrees.sequence
    if text_tokens < ranks or image_tokens < ranks:
        raise Unsupported(
            f"{text_tokens} text and {image_tokens} image tokens are too few to split over {ranks} workers: use a "
            "larger image, a longer prompt or fewer workers"
        )


def check_has_encoder(has_encoder: bool) -> None:
    """Raise ``Unsupported`` for a VAE that was lent as its decoder alone."""
    if not has_encoder:
        raise Unsupported("encode: this VAE was lent without its encoder tensors; lend the whole VAE")


def prepare(model: Model[Any], **tensors: torch.Tensor) -> list[torch.Tensor]:
    """Move tensors to the model's device and dtype, and check that they are finite there, with one wait for the GPU."""
    moved: list[torch.Tensor] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise BadRequest(f"{name}: dtype is {_name(tensor.dtype)}, use a floating dtype")
        moved.append(tensor.to(model.device, model.dtype))
    check_finite(dict(zip(tensors, moved, strict=True)))
    return moved


def prepare_image(model: Model[Any], image: torch.Tensor, channels: int, multiple: int) -> torch.Tensor:
    """Check images for an encode, (batch, channels, height, width), and move them as :func:`prepare` does.

    Raises:
        BadRequest: another shape, sides that are no multiples of ``multiple``, or values that are not finite.
    """
    if image.ndim != 4 or image.shape[1] != channels or not 0 < image.shape[0] <= MAX_BATCH:
        raise BadRequest(f"image is {list(image.shape)}: use [batch, {channels}, height, width]")
    check_sides(image.shape[2], image.shape[3], multiple)
    (image,) = prepare(model, image=image)
    return image


def _shape_text(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if side is None else str(side) for side in shape)}]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
