"""Build the request to encode texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xditd.client.io_places import IoPlaces
from xditd.client.jobs.component import Component
from xditd.client.jobs.job_requests import JobRequest
from xditd.client.jobs.text_checks import check_images, check_layers, check_mask, check_token_ids
from xditd.ipc.errors import BadRequest
from xditd.ipc.requests import EncodeText
from xditd.ipc.tensors import HostShmBlock

if TYPE_CHECKING:
    import torch


def encode_text_request(
    encoder: Component,
    token_ids: torch.Tensor | Sequence[Sequence[int]],
    *,
    pooled: bool,
    mask: torch.Tensor | Sequence[Sequence[int]] | None = None,
    layers: Sequence[int] = (),
    images: Mapping[str, Any] | None = None,
) -> JobRequest:
    """Build the request to encode text to ``hidden_states`` and, if requested, ``pooled``."""
    import torch

    facts = encoder.text_encoder
    if not isinstance(pooled, bool):
        raise BadRequest(f"pooled: {pooled!r:.100} is of type {type(pooled).__name__}, use True or False")
    ids = check_token_ids(token_ids)
    places = IoPlaces()
    ids_at = places.add_input(ids)
    inputs = [(ids_at, ids)]
    if mask is not None:
        mask = check_mask(mask, ids)
        inputs.append((places.add_input(mask), mask))
    layers = check_layers(layers)
    images = check_images({} if images is None else images, facts)
    images_at = {name: places.add_input(each) for name, each in images.items()}
    inputs += [(images_at[name], each) for name, each in images.items()]
    shape = (*ids.shape, facts.width * max(1, len(layers)))
    outputs = {"hidden_states": places.add_output(torch.float32, shape)}
    if pooled:
        outputs["pooled"] = places.add_output(torch.float32, (ids.shape[0], facts.width))

    def write(request_id: str, io: HostShmBlock) -> EncodeText:
        return EncodeText(
            request_id=request_id,
            encoder_id=encoder.component_id,
            loras=encoder.loras,
            io=io,
            token_ids=ids_at,
            mask=None if mask is None else inputs[1][0],
            layers=layers,
            images=images_at,
            out=outputs["hidden_states"],
            out_pooled=outputs.get("pooled"),
        )

    return JobRequest(places, inputs, outputs, ids.device, write)
