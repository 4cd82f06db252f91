"""The ControlNets of jobs: found, checked, and given what they read besides the transformer's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch

from xditd.gpu_workers.jobs.context import JobContext
from xditd.gpu_workers.jobs.job_io import OpenIo
from xditd.gpu_workers.jobs.reading import ArgumentReader, check_names
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.controls import Control, check_blocks, check_fits
from xditd.gpu_workers.models.finite import check_finite
from xditd.gpu_workers.models.job_checks import check_shape
from xditd.gpu_workers.models.operations import Inputs, Wanted
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.ipc.errors import BadRequest, RequestError, Unsupported, named
from xditd.ipc.facts import LatentFacts, LatentScaling
from xditd.ipc.job_parts import Control as WantedControl
from xditd.ipc.job_parts import PartControl

RESIDUALS: Final = "residuals"

Noise = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Draws noise of a shape, on the CPU, from the generator of a job's seed."""


def read_part_controls(
    transformer: Component, given: Sequence[PartControl], context: JobContext, reader: ArgumentReader, where: str
) -> tuple[Control, ...]:
    """Read and check the ControlNets of one forward of a call. ``where`` begins errors.

    Raises:
        BadRequest, Unsupported: a ControlNet that does not fit the transformer, or wrong arguments.
        UnknownComponent: it is not lent.
    """
    found: list[Control] = []
    counts: dict[str, Mapping[str, int]] = {}
    for number, each in enumerate(given):
        place = f"{where}controls[{number}]"
        component = context.components.get(each.component_id, "controlnet")
        facts, operations = component.controlnet_facts, component.model.operations_for("controlnet")
        check_fits(transformer, component, place, generates=False)
        check_names(each.arguments, facts.arguments, f"{place}.arguments")
        check_blocks(each.blocks, facts.residuals, place)
        inputs = reader.read(each.arguments, f"{place}.")
        try:
            operations.check(component.model, inputs)
        except RequestError as error:
            raise named(place, error) from error
        if not each.blocks:
            counts[place] = facts.residuals
        finite = FiniteCheck()
        found.append(
            Control(
                component.model,
                inputs,
                each.scale,
                each.blocks,
                partial(finite.note_part, RESIDUALS),
                partial(context.check_finite, finite, component),
            )
        )
    _check_alike(counts)
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Picture:
    """A ControlNet of a generation, with the arguments that its picture gives."""

    component: Component
    scale: float
    picture: Mapping[str, Any]
    steps: Sequence[bool]
    """Of each step, whether it runs."""


@dataclass(frozen=True, eq=False)
class GenerationControls:
    """The ControlNets of a generation, their pictures encoded."""

    pictures: Sequence[_Picture] = ()
    has_images: bool = False
    """Whether the VAE has encoded some of their pictures."""

    _noted: list[tuple[int, Component, FiniteCheck]] = field(default_factory=list)
    """Of each step and ControlNet in turn, the check of its residuals."""

    def check(self, context: JobContext, step: int | None) -> None:
        """Check the residuals up to a step, the first whose latents are not finite; ``None``: those of all steps are.

        In later steps, residuals that are not finite are of such latents.

        Raises:
            NotFinite, StaleSource: see :meth:`JobContext.check_finite`.
        """
        for number, component, finite in self._noted:
            if step is not None and number <= step:
                context.check_finite(finite, component)

    def add(self, parts: Sequence[Inputs], step: int) -> list[Inputs]:
        """Return the forwards of a step with the ControlNets that run in it."""
        active = [each for each in self.pictures if each.steps[step] and each.scale != 0.0]
        if not active:
            return list(parts)
        checks = [FiniteCheck() for _ in active]
        self._noted.extend((step, each.component, check) for each, check in zip(active, checks, strict=True))
        return [
            replace(part, controls=tuple(_beside(part, *each) for each in zip(active, checks, strict=True)))
            for part in parts
        ]


def read_controls(
    transformer: Component,
    vae: Component | None,
    given: Sequence[WantedControl],
    wanted: Wanted,
    names: Sequence[str],
    context: JobContext,
    io: OpenIo,
    draw: Noise | None,
) -> GenerationControls:
    """Read, check and encode the ControlNets of a generation, whose conditioning has ``names``.

    Pictures are encoded in their order, as diffusers' pipelines do: a sample of the VAE's distribution with the noise
    that ``draw`` gives, or its mode without.

    Raises:
        BadRequest: a ControlNet for another model, a picture of another size, a wrong mode, or no VAE for pictures.
        Unsupported: residuals that cannot be added up, or a VAE that draws no samples.
        UnknownComponent: it is not lent.
    """
    found: list[_Picture] = []
    counts: dict[str, Mapping[str, int]] = {}
    latents_facts = transformer.transformer_facts.latents
    for number, each in enumerate(given):
        place = f"controls[{number}]"
        component = context.components.get(each.component_id, "controlnet")
        check_fits(transformer, component, place, generates=True, names=names)
        operations = component.model.operations_for("controlnet")
        try:
            operations.check_mode(component.match.config, each.mode)
            if each.start > each.end:
                raise BadRequest(f"start {each.start:g}: it is after the end {each.end:g}")
            if (each.image is None) == (each.latents is None):
                raise BadRequest("image, latents: give either the picture or its latents")
        except RequestError as error:
            raise named(place, error) from error
        counts[place] = component.controlnet_facts.residuals
        if each.latents is not None:
            latents = _read_latents(
                f"{place}.latents", io.read(f"{place}.latents", each.latents, context.device), wanted, latents_facts
            )
        else:
            assert each.image is not None
            image = io.read(f"{place}.image", each.image, context.device)
            image = for_batch(f"{place}.image", image, wanted.batch)
            latents = encode_sample(f"{place}.image", image, vae, wanted, latents_facts.scaling, draw)
        latents = latents.to(context.device, component.model.dtype)
        check_finite({f"{place}: latents of the picture": latents})
        steps = [_runs(step, wanted.steps, each) for step in range(wanted.steps)]
        picture = operations.picture(component.model, latents, each.mode)
        found.append(_Picture(component, each.scale, picture, steps))
    _check_alike(counts)
    return GenerationControls(found, any(each.image is not None for each in given))


def _beside(part: Inputs, control: _Picture, finite: FiniteCheck) -> Control:
    model = control.component.model
    inputs = model.operations_for("controlnet").beside(control.component.match.config, part, control.picture)
    note = partial(finite.note_part, RESIDUALS)
    return Control(model, inputs, control.scale, note=note)


def _runs(step: int, steps: int, control: WantedControl) -> bool:
    """Return whether a ControlNet runs in a step, by the rule of diffusers' pipelines."""
    return not (step / steps < control.start or (step + 1) / steps > control.end)


def _check_alike(counts: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse to add up residuals of different numbers, which belong to different blocks.

    Raises:
        Unsupported: names two ControlNets and their numbers.
    """
    places = list(counts)
    for place in places[1:]:
        if counts[place] != counts[places[0]]:
            here, there = (" and ".join(map(str, counts[each].values())) for each in (places[0], place))
            raise Unsupported(
                f"{places[0]} gives {here} residuals, and {place} {there}: blocks would get the residuals of others "
                "in their sum; use ControlNets of equally many blocks"
            )


def _read_latents(place: str, latents: torch.Tensor, wanted: Wanted, facts: LatentFacts) -> torch.Tensor:
    shape = facts.shape(wanted.batch, wanted.height, wanted.width)
    check_shape(place, latents, (None, *shape[1:]))
    return for_batch(place, latents, wanted.batch)


def encode_sample(
    place: str,
    image: torch.Tensor,
    vae: Component | None,
    wanted: Wanted,
    scaling: LatentScaling,
    draw: Noise | None,
    *,
    is_picture: bool = False,
) -> torch.Tensor:
    """Encode pictures on this rank, as every rank does: each needs all of it.

    The latents are a sample of the VAE's distribution with the noise that ``draw`` gives, or its mode without.

    Raises:
        BadRequest: no VAE, a wrong size, or values that are not finite.
        Unsupported: a VAE that draws no samples, with ``draw``.
    """
    if vae is None:
        raise BadRequest(
            f"{place}: a picture is encoded by the generation's VAE, and it has none; give one, or latents"
        )
    facts, operations = vae.vae_facts, vae.model.operations_for("vae")
    check_shape(place, image, (None, facts.image_channels, wanted.height, wanted.width))
    check_finite({place: image})
    if is_picture:  # as diffusers has pictures of Pillow: convolutions round by it
        image = image.contiguous(memory_format=torch.channels_last)
    if draw is None:
        return operations.encode(vae.model, image, scaling)
    sample = getattr(operations, "sample", None)
    if sample is None:
        raise Unsupported(
            f"{place}: the VAE {vae.match.family.name} gives no samples, which a seed asks for; give latents"
        )
    encoded: torch.Tensor = sample(vae.model, image, scaling, draw)
    return encoded


def for_batch(place: str, tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat one row for each image of the batch.

    Raises:
        BadRequest: neither one row nor one for each image.
    """
    if tensor.shape[0] not in (1, batch):
        raise BadRequest(f"{place}: {tensor.shape[0]} rows for a batch of {batch}; give one, or one for each image")
    return tensor.repeat_interleave(batch // tensor.shape[0], dim=0)
