"""Build the requests of jobs: check the inputs, and assign each tensor its place in the job's block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from xditd.client.io_blocks import IoBlock, IoPool
from xditd.client.io_places import DevicePlaces, IoPlaces
from xditd.client.jobs import checks
from xditd.client.jobs.arguments import ArgumentWriter, KeptTensor, check_text, result_room
from xditd.client.jobs.component import Component
from xditd.client.jobs.controls import CallControl, Control, check_controls, write_controls, write_part_controls
from xditd.client.jobs.device_use import Room
from xditd.client.jobs.schedules import schedule_of
from xditd.client.jobs.start_images import check_start
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import LatentFacts
from xditd.ipc.field_types import ITEM_BYTES
from xditd.ipc.job_parts import Part, Sampling
from xditd.ipc.requests import Call, Generate, InferenceRequest, Role
from xditd.ipc.tensors import HostShmBlock, IoTensor
from xditd.ipc.transports.tensor_views import torch_dtype

if TYPE_CHECKING:
    import torch

    from xditd.client.device_blocks import DeviceBlock


@dataclass(frozen=True, eq=False, repr=False)
class JobRequest:
    """A checked job. ``write`` builds the request from a request id and a block; ``outputs`` are places by name."""

    places: IoPlaces
    inputs: Sequence[tuple[IoTensor, torch.Tensor]]
    outputs: Mapping[str, IoTensor]
    device: torch.device
    write: Callable[[str, HostShmBlock], InferenceRequest]

    def fill(self, pool: IoPool) -> IoBlock:
        """Take a block from the pool and copy the inputs into it."""
        block = pool.borrow(self.places.size_bytes)
        try:
            for spec, tensor in self.inputs:
                block.write(spec, tensor)
        except BaseException:
            pool.give_back(block)
            raise
        return block


@dataclass(frozen=True, eq=False, repr=False)
class GenerationRequest(JobRequest):
    """A generation: its outputs are ``latents``, ``image`` with a VAE, ``denoised`` or ``preview`` with previews."""

    sampling: Sampling
    image_dtype: torch.dtype | None
    """In which the VAE computes the image; ``None`` without one, or of eight bits."""


@dataclass(frozen=True, eq=False, repr=False)
class CallRequest(JobRequest):
    """A call: only its reply has the places of the results. ``devices`` are those for the results of each part."""

    devices: Sequence[torch.device]
    kept: Sequence[KeptTensor]
    """Tensors that the workers keep when the call is done."""
    device_places: DevicePlaces
    """Places in a block of device memory, which the call needs if they have a GPU."""
    device_inputs: Sequence[tuple[IoTensor, torch.Tensor]]
    device_room_bytes: int
    """Room for large results in that block."""

    def fill_all(self, pool: IoPool) -> IoBlock | None:
        """Take blocks from the pool and copy the inputs into them; ``None`` if there is no room on the GPU."""
        device: DeviceBlock | None = None
        if self.device_places.index is not None:
            device = pool.devices.borrow(self.device_places.size_bytes, self.device_places.index)
            if device is None:
                return None
        try:
            if device is not None:
                for spec, tensor in self.device_inputs:
                    device.write(spec, tensor)
            block = self.fill(pool)  # while the GPU copies
        except BaseException:
            if device is not None:
                pool.devices.give_back(device)
            raise
        block.device, block.dropped = device, pool.devices.take_retired()
        try:
            if device is not None:
                device.wait()
        except BaseException:
            pool.give_back(block)
            raise
        return block


def room_for_results(
    places: IoPlaces, device_places: DevicePlaces, room: Room, guess_bytes: int, device: torch.device
) -> tuple[int, int, int, int]:
    """Reserve room for results: offset and size in the block, then in the block of device memory.

    ``guess_bytes`` is a guess, ``device`` that of the results. If more is needed, workers answer with their own block.
    """
    large_bytes = guess_bytes if room.device_bytes is None else room.device_bytes
    if large_bytes >= limits.DEVICE_IO_FROM_BYTES and room.is_on_device and device_places.reserves_on(device):
        host_bytes = max(room.host_bytes, limits.DEVICE_IO_FROM_BYTES)  # for small ones
        return places.add_room(host_bytes), host_bytes, device_places.add_room(large_bytes), large_bytes
    host_bytes = max(room.host_bytes, guess_bytes)
    return places.add_room(host_bytes), host_bytes, 0, 0


def call_request(
    component: Component,
    parts: Sequence[Mapping[str, Any]],
    foreseen: Mapping[str, Sequence[float] | torch.Tensor] | None,
    variant: str,
    controls: Sequence[Sequence[tuple[str, CallControl]]],
    is_kept: Callable[[KeptTensor], bool],
    room: Room,
) -> CallRequest:
    """Build a request for one forward for each of ``parts``, with ``room`` for results.

    ``controls`` are the ControlNets of each part with their ids, or are empty.

    Kept tensors for which ``is_kept`` returns true are sent by id.
    """
    facts = component.transformer
    check_parts(parts)
    checked_foreseen = checks.check_foreseen(foreseen)
    for name in checked_foreseen:
        check_text("foreseen: name", name)
    checked_variant = checks.check_variant(variant, facts)
    places, device_places = IoPlaces(), DevicePlaces()
    writer = ArgumentWriter(places, is_kept, device_places=device_places if room.is_on_device else None)
    # A transformer returns a tensor with the shape of its first argument, the sample.
    sample = facts.arguments[0].name if facts.arguments else ""

    def sample_of(arguments: Mapping[str, Any]) -> Any:
        return arguments.get(sample)

    return write_call(
        component,
        parts,
        writer,
        (places, device_places),
        room,
        sample_of,
        controls=controls,
        foreseen=checked_foreseen,
        variant=checked_variant,
    )


def check_parts(parts: Sequence[object]) -> None:
    """Raise ``BadRequest`` unless a call may have as many parts."""
    if not isinstance(parts, list | tuple):
        raise BadRequest(f"parts: {parts!r:.100} is of type {type(parts).__name__}, use a list of dicts")
    if not 1 <= len(parts) <= limits.MAX_PARTS:
        raise BadRequest(f"parts: {len(parts)} sets of arguments; give from 1 to {limits.MAX_PARTS}")


def write_call(
    component: Component,
    parts: Sequence[Mapping[str, Any]],
    writer: ArgumentWriter,
    into: tuple[IoPlaces, DevicePlaces],
    room: Room,
    sample_of: Callable[[Mapping[str, Any]], Any],
    *,
    controls: Sequence[Sequence[tuple[str, CallControl]]] = (),
    device: torch.device | None = None,
    **fields: Any,
) -> CallRequest:
    """Write the arguments of all parts, and build the request. ``fields`` are further fields of ``Call``.

    ``sample_of`` returns the argument of a part whose shape its results will probably have; ``device`` is that of the
    results, without it the device of each part's first tensor.
    """
    import torch

    places, device_places = into
    written: list[Part] = []
    devices: list[torch.device] = []
    for number, arguments in enumerate(parts):
        if not isinstance(arguments, Mapping):
            raise BadRequest(f"arguments: a dict by name is needed, not {type(arguments).__name__}")
        where = f"parts[{number}]." if len(parts) > 1 else ""
        part = writer.write(arguments, where)
        devices.append(device or writer.device or torch.device("cpu"))
        theirs = write_part_controls(writer, controls[number], where) if controls else ()
        written.append(Part(arguments=part, controls=theirs))
    item_bytes = ITEM_BYTES[component.facts.dtype]
    guess_bytes = sum(result_room(sample_of(arguments), item_bytes) for arguments in parts)
    at, size_bytes, device_at, device_size_bytes = room_for_results(
        places, device_places, room, guess_bytes, devices[0]
    )

    def write(request_id: str, io: HostShmBlock) -> Call:
        return Call(
            request_id=request_id,
            component_id=component.component_id,
            loras=component.loras,
            io=io,
            parts=tuple(written),
            out_offset_bytes=at,
            out_size_bytes=size_bytes,
            device_out_offset_bytes=device_at,
            device_out_size_bytes=device_size_bytes,
            **fields,
        )

    return CallRequest(
        places,
        writer.inputs,
        {},
        devices[0],
        write,
        devices,
        writer.kept,
        device_places,
        writer.device_inputs,
        device_size_bytes,
    )


def generate_request(
    transformer: Component,
    vae: Component | None,
    conditioning: Mapping[str, Any],
    *,
    height: int,
    width: int,
    frames: int = 1,
    second: Component | None = None,
    steps: int | None,
    sigmas: Sequence[float] | torch.Tensor | None,
    guidance_scale: float | None,
    seed: int | None,
    noise: torch.Tensor | None,
    previews: bool | Literal["image"],
    step_cache: float,
    variant: str,
    options: Mapping[str, bool | int | float] | None,
    controls: Sequence[tuple[Component, Control]] = (),
    scheduler: Mapping[str, object] | None = None,
    start_image: torch.Tensor | None = None,
    start_mask: torch.Tensor | None = None,
    strength: float = 1.0,
) -> GenerationRequest:
    """Build the request for a generation. Exactly one of ``seed`` and ``noise`` is given."""
    import torch

    facts = transformer.transformer
    batch = checks.check_conditioning(conditioning, facts.conditioning)
    checks.check_size(height, width, facts.latents)
    checks.check_frames(frames, facts.latents)
    if second is not None and facts.stages < 2:
        raise BadRequest("transformer_2: this transformer runs alone; leave the second out")
    steps = facts.default_steps if steps is None else steps
    checks.check_steps(steps)
    if noise is not None:
        checks.check_noise(noise, batch, height, width, facts.latents, frames)
    else:
        checks.check_whole("seed", 0 if seed is None else seed, 0, 2**63 - 1)
    check_start(start_image, start_mask, strength, facts, (batch, height, width), has_vae=vae is not None)
    sampling = Sampling(
        strength=float(strength),
        schedule=None if scheduler is None else schedule_of(scheduler),
        height=height,
        width=width,
        frames=frames,
        steps=steps,
        sigmas=None if sigmas is None else checks.check_sigmas(sigmas, steps),
        guidance_scale=None if guidance_scale is None else checks.check_guidance("guidance_scale", guidance_scale),
        seed=seed,
        step_cache_threshold=checks.check_step_cache(step_cache, facts),
        variant=checks.check_variant(variant, facts),
        options=checks.check_options(options, facts),
    )
    used: dict[Role, Component | None] = {"transformer": transformer, "transformer_2": second, "vae": vae}
    components = {role: each.component_id for role, each in used.items() if each is not None}
    loras = {role: each.loras for role, each in used.items() if each is not None and each.loras}
    check_controls(controls, facts.latents, height, width, has_vae=vae is not None)

    places = IoPlaces()
    writer = ArgumentWriter(places, max_values=0)
    names = [each.name for each in facts.conditioning if conditioning.get(each.name) is not None]
    ordered = {name: conditioning[name] for name in names}
    written = writer.write(ordered, "conditioning.")
    inputs = list(writer.inputs)
    placed: dict[str, IoTensor] = {}
    for name, tensor in (("noise", noise), ("start_image", start_image), ("start_mask", start_mask)):
        if tensor is not None:
            placed[name] = places.add_input(tensor)
            inputs.append((placed[name], tensor))
    guides = write_controls(controls, places, inputs)
    first = ordered[names[0]]
    like = noise if noise is not None else first[0] if isinstance(first, (list, tuple)) else first
    dtype = torch.float32 if sampling.variant in facts.float32_latents else like.dtype
    outputs = _place_outputs(places, previews, facts.latents, vae, dtype, (batch, height, width, frames))

    def write(request_id: str, io: HostShmBlock) -> Generate:
        return Generate(
            request_id=request_id,
            components=components,
            loras=loras,
            controls=guides,
            io=io,
            conditioning=written,
            sampling=sampling,
            out_latents=outputs["latents"],
            out_image=outputs.get("image"),
            out_denoised=outputs.get("denoised"),
            out_preview=outputs.get("preview"),
            **placed,
        )

    image_dtype = None if vae is None or ITEM_BYTES[vae.facts.dtype] < 2 else torch_dtype(vae.facts.dtype)
    return GenerationRequest(places, inputs, outputs, like.device, write, sampling, image_dtype)


def _place_outputs(
    places: IoPlaces,
    previews: bool | Literal["image"],
    latents: LatentFacts,
    vae: Component | None,
    dtype: torch.dtype,
    size: tuple[int, int, int, int],
) -> dict[str, IoTensor]:
    """Place the results, and what each step is shown by; ``size`` are batch, height, width and frames.

    Raises:
        BadRequest: no such previews, or images without a VAE.
    """
    import torch

    batch, height, width, frames = size
    outputs = {"latents": places.add_output(dtype, latents.shape(batch, height, width, frames))}
    if vae is not None:
        of_video = (frames,) if latents.frames else ()
        outputs["image"] = places.add_output(torch.float32, (batch, vae.vae.image_channels, *of_video, height, width))
    if not isinstance(previews, bool) and not (isinstance(previews, str) and previews == "image"):
        raise BadRequest(f"previews: {previews!r} is not True, False or 'image'")
    if previews == "image":
        if vae is None:
            raise BadRequest("previews: an image needs vae=; give it, or previews=True for latents")
        outputs["preview"] = places.add_output(torch.float32, (batch, vae.vae.image_channels, height, width))
    elif previews:
        outputs["denoised"] = places.add_output(dtype, outputs["latents"].shape)
    return outputs
