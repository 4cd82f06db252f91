"""ControlNets of a job, as callers name them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from xditd.client.io_places import IoPlaces
from xditd.client.jobs import checks
from xditd.client.jobs.arguments import ArgumentWriter, check_text
from xditd.client.jobs.component import Component
from xditd.ipc import job_parts, limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ControlNetFacts, LatentFacts
from xditd.ipc.loras import MAX_SCALE
from xditd.ipc.tensors import IoTensor

if TYPE_CHECKING:
    import torch

    from xditd.client.loans import Loan


C = TypeVar("C")


@dataclass(frozen=True, eq=False)
class Control:
    """A lent ControlNet of a generation, and its picture.

    Either ``image``, (batch or 1, 3, height, width) in [-1, 1], which the generation's VAE encodes, or ``latents`` of
    it, as :meth:`Client.encode` gives them. Its residuals are multiplied by ``scale``, in the steps from the share
    ``start`` to the share ``end`` of all steps. ``mode`` is the kind of the picture for a union ControlNet.

    With a ``seed`` the picture's latents are a sample of the VAE's distribution, drawn before the noise as diffusers'
    pipelines do; with ``noise`` they are its mode.
    """

    controlnet: Loan | str
    image: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: int | None = None

    def check(self, where: str, facts: ControlNetFacts, latents: LatentFacts, height: int, width: int) -> None:
        """Check what needs no worker. ``where`` begins errors; ``facts`` are those of the ControlNet.

        Raises:
            BadRequest: names the field, its value and the remedy.
        """
        for name, value in (("scale", self.scale), ("start", self.start), ("end", self.end)):
            _check_number(f"{where}.{name}", value)
        if not abs(self.scale) <= MAX_SCALE:
            raise BadRequest(f"{where}.scale: {self.scale:g}; use at most {MAX_SCALE:g}")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise BadRequest(f"{where}: start {self.start:g} and end {self.end:g}; use 0 <= start <= end <= 1")
        if (self.image is None) == (self.latents is None):
            raise BadRequest(f"{where}: give either the image or its latents")
        if self.mode is not None:
            checks.check_whole(f"{where}.mode", self.mode, 0, limits.MAX_CONTROL_MODES - 1)
        _check_mode(where, self.mode, facts.modes)
        if self.image is not None:
            checks.check_tensor(f"{where}.image", self.image, "(batch, channels, height, width)", 4)
            _check_sides(f"{where}.image", self.image, (height, width))
        elif self.latents is not None:
            checks.check_tensor(f"{where}.latents", self.latents, checks.LATENT_AXES, 4)
            _check_sides(f"{where}.latents", self.latents, (height // latents.pixels, width // latents.pixels))


@dataclass(frozen=True, eq=False)
class CallControl:
    """A lent ControlNet that runs before one forward of a call, whose blocks get its residuals, times ``scale``.

    ``arguments`` are those of its class's forward, as :meth:`Client.call` takes arguments. ``blocks`` are, by the name
    of the transformer's argument, for each block in turn the number of the residual that it gets; without them the
    transformer's class decides.
    """

    controlnet: Loan | str
    arguments: Mapping[str, Any]
    scale: float = 1.0
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def check(self, where: str) -> None:
        """Check what needs no worker.

        Raises:
            BadRequest: names the field, its value and the remedy.
        """
        _check_number(f"{where}.scale", self.scale)
        if not abs(self.scale) <= MAX_SCALE:
            raise BadRequest(f"{where}.scale: {self.scale!r}; use a number of at most {MAX_SCALE:g}")
        for name, value in (("arguments", self.arguments), ("blocks", self.blocks)):
            if not isinstance(value, Mapping):
                raise BadRequest(
                    f"{where}.{name}: {value!r:.100} is of type {type(value).__name__}, use a dict by name"
                )
        most = limits.MAX_CONTROLLED_BLOCKS
        for name, numbers in self.blocks.items():
            check_text(f"{where}.blocks: name", name)
            if len(checked_list(f"{where}.blocks.{name}", numbers)) > most:
                raise BadRequest(f"{where}.blocks.{name}: {len(numbers)} blocks, at most {most}")
            for number in numbers:
                checks.check_whole(f"{where}.blocks.{name}", number, 0, most - 1)


def checked_list(name: str, value: Any) -> Sequence[Any]:
    """Return a list or tuple that an argument is.

    Raises:
        BadRequest: what is none of both.
    """
    if not isinstance(value, list | tuple):
        raise BadRequest(f"{name}: {value!r:.100} is of type {type(value).__name__}, use a list")
    return value


def checked_controls(name: str, value: Any, kind: type[C]) -> Sequence[C]:
    """Return the ControlNets that an argument lists.

    Raises:
        BadRequest: no list, or one with other objects.
    """
    for number, each in enumerate(checked_list(name, value)):
        if not isinstance(each, kind):
            raise BadRequest(f"{name}[{number}]: {each!r:.100} is of type {type(each).__name__}, use {kind.__name__}()")
    found: Sequence[C] = value
    return found


def check_controls(
    controls: Sequence[tuple[Component, Control]], latents: LatentFacts, height: int, width: int, *, has_vae: bool
) -> None:
    """Check the ControlNets of a generation of this size, each with its component.

    Raises:
        BadRequest: names the ControlNet's number, the field and the remedy.
    """
    _check_count("controls", len(controls))
    for number, (component, control) in enumerate(controls):
        control.check(f"controls[{number}]", component.controlnet, latents, height, width)
        if control.image is not None and not has_vae:
            raise BadRequest(f"controls[{number}].image: the generation's VAE encodes it; give vae=, or its latents")


def write_controls(
    controls: Sequence[tuple[Component, Control]], places: IoPlaces, inputs: list[tuple[IoTensor, torch.Tensor]]
) -> tuple[job_parts.Control, ...]:
    """Reserve room for the pictures of checked ControlNets, add them to ``inputs``, and return the request's part."""
    used = []
    for component, control in controls:
        at: dict[str, IoTensor | None] = {"image": None, "latents": None}
        for name in at:
            tensor = getattr(control, name)
            if tensor is not None:
                at[name] = place = places.add_input(tensor)
                inputs.append((place, tensor))
        used.append(
            job_parts.Control(
                component_id=component.component_id,
                scale=float(control.scale),
                start=float(control.start),
                end=float(control.end),
                mode=control.mode,
                **at,
            )
        )
    return tuple(used)


def write_part_controls(
    writer: ArgumentWriter, controls: Sequence[tuple[str, CallControl]], where: str
) -> tuple[job_parts.PartControl, ...]:
    """Write the ControlNets of one forward, each with its component's id. ``where`` begins errors."""
    _check_count(f"{where}controls", len(controls))
    written = []
    for number, (component_id, control) in enumerate(controls):
        place = f"{where}controls[{number}]"
        control.check(place)
        written.append(
            job_parts.PartControl(
                component_id=component_id,
                arguments=writer.write(control.arguments, f"{place}."),
                scale=float(control.scale),
                blocks={name: tuple(numbers) for name, numbers in control.blocks.items()},
            )
        )
    return tuple(written)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise BadRequest(f"{name}: {value!r:.100} is not a finite number")


def _check_count(where: str, count: int) -> None:
    """Raise ``BadRequest`` if there are more ControlNets than one forward may have."""
    if count > limits.MAX_CONTROLS:
        raise BadRequest(f"{where}: {count} ControlNets, at most {limits.MAX_CONTROLS}")


def _check_mode(where: str, mode: int | None, modes: int) -> None:
    if not modes and mode is not None:
        raise BadRequest(f"{where}.mode: {mode}, but this ControlNet is for one kind of pictures; leave it out")
    if modes and mode is None:
        raise BadRequest(f"{where}.mode: a union ControlNet needs the kind of its picture, from 0 to {modes - 1}")
    if mode is not None and mode >= modes:
        raise BadRequest(f"{where}.mode: {mode}; this ControlNet has the modes 0 to {modes - 1}")


def _check_sides(name: str, tensor: torch.Tensor, sides: tuple[int, int]) -> None:
    if tuple(tensor.shape[2:]) != sides:
        raise BadRequest(
            f"{name}: shape {checks.shape_text(tensor)} for a generation of {sides[0]}x{sides[1]}; resize the picture"
        )
