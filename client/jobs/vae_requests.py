"""Build the requests to decode and to encode: check the inputs, and assign each tensor its place in the job's block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xditd.client.io_places import IoPlaces
from xditd.client.jobs import checks
from xditd.client.jobs.component import Component
from xditd.client.jobs.job_requests import JobRequest
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import LatentScaling
from xditd.ipc.requests import Decode, Encode
from xditd.ipc.tensors import HostShmBlock

if TYPE_CHECKING:
    import torch


def decode_request(
    vae: Component, latents: torch.Tensor, transformer: Component | None = None, scaling: LatentScaling | None = None
) -> JobRequest:
    """Build the request to decode a transformer's latents to ``image``, or the VAE's own latents without one.

    ``scaling`` is that of the latents, if it is neither the transformer's nor the default.
    """
    facts, scaling = vae.vae, _scaling_of(vae, transformer, scaling)
    checks.check_latents("latents", latents, facts.latents)
    places = IoPlaces()
    latents_at = places.add_input(latents)
    shape = facts.latents.pixels_of(tuple(latents.shape), facts.image_channels)
    out_at = places.add_output(latents.dtype, shape)

    def write(request_id: str, io: HostShmBlock) -> Decode:
        return Decode(
            request_id=request_id, vae_id=vae.component_id, io=io, latents=latents_at, out=out_at, scaling=scaling
        )

    return JobRequest(places, [(latents_at, latents)], {"image": out_at}, latents.device, write)


def encode_request(
    vae: Component, image: torch.Tensor, transformer: Component | None = None, scaling: LatentScaling | None = None
) -> JobRequest:
    """Build the request to encode an image to a transformer's ``latents``, or to the VAE's own without one.

    The image is sent in its memory format, channels first or last.
    """
    facts, scaling = vae.vae, _scaling_of(vae, transformer, scaling)
    checks.check_image(image, facts)
    shape = facts.latents.shape_of(tuple(image.shape))
    places = IoPlaces()
    if _has_channels_last(image):
        image = image.movedim(1, -1)
    image_at = places.add_input(image)
    out_at = places.add_output(image.dtype, shape)

    def write(request_id: str, io: HostShmBlock) -> Encode:
        return Encode(
            request_id=request_id, vae_id=vae.component_id, io=io, image=image_at, out=out_at, scaling=scaling
        )

    return JobRequest(places, [(image_at, image)], {"latents": out_at}, image.device, write)


def _scaling_of(vae: Component, transformer: Component | None, scaling: LatentScaling | None) -> LatentScaling | None:
    """Check that a transformer's latents have the VAE's size, and return their scaling; ``None`` for the default.

    Raises:
        BadRequest: ``scaling`` is of another type.
    """
    if scaling is not None and not isinstance(scaling, LatentScaling):
        raise BadRequest(f"scaling: {scaling!r:.100} is of type {type(scaling).__name__}, use a LatentScaling")
    if transformer is None:
        return scaling
    latents = transformer.transformer.latents
    latents.check_vae(vae.vae.latents)
    return latents.scaling if scaling is None else scaling


def _has_channels_last(image: torch.Tensor) -> bool:
    """Return whether the image, or the larger one that it is a slice of, has channels-last strides.

    Convolutions then compute in that memory format and round differently, so the workers must use the same. Videos are
    sent with channels first.
    """
    if image.ndim != 4:
        return False
    _, channels, _, width = image.shape
    return image.stride(1) == 1 and image.stride(3) >= channels > 1 and image.stride(2) >= image.stride(3) * width
