"""Which places of tensors the daemon refuses before a job is queued."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from xditd.daemon.front.handlers import jobs
from xditd.ipc.arguments import InIo
from xditd.ipc.errors import BadRequest
from xditd.ipc.job_parts import Control, LoraUse, Part, PartControl, Sampling, StepStrength
from xditd.ipc.requests import Call, Generate
from xditd.ipc.tensors import ComponentKind, CudaIpcBlock, Fingerprint, HostShmBlock, IoTensor

FINGERPRINT = Fingerprint(length_bytes=4096, digest=bytes(16))
DEVICE = CudaIpcBlock(device_uuid="GPU-1", handle=bytes(64), size_bytes=8192, fingerprint=FINGERPRINT)


def call(leaf: InIo, device_io: CudaIpcBlock | None = DEVICE, **more: Any) -> Call:
    return Call(
        request_id="1",
        component_id="c1",
        io=HostShmBlock(fd=3, inode=1, size_bytes=4096, fingerprint=FINGERPRINT),
        parts=(Part(arguments={"x": leaf}),),
        out_offset_bytes=0,
        out_size_bytes=0,
        device_io=device_io,
        **more,
    )


def generation(components: dict[str, str] | None = None, **loras: tuple[LoraUse, ...]) -> Generate:
    place = IoTensor(offset_bytes=0, dtype="float32", shape=(1,))
    return Generate(
        request_id="1",
        components=components or {"transformer": "t", "vae": "v"},
        loras=loras,
        io=HostShmBlock(fd=3, inode=1, size_bytes=4096, fingerprint=FINGERPRINT),
        conditioning={},
        sampling=Sampling(height=64, width=64, steps=4, seed=0),
        out_latents=place,
    )


def use(*later: int) -> tuple[LoraUse, ...]:
    return (LoraUse(component_id="l", strength=1.0, later=tuple(StepStrength(step, 0.5) for step in later)),)


def leaf(offset_bytes: int, *, in_device_io: bool) -> InIo:
    return InIo(offset_bytes=offset_bytes, dtype="uint8", shape=(1,), in_device_io=in_device_io)


def test_each_tensor_is_checked_against_its_own_block() -> None:
    jobs._check_tensors(call(leaf(8191, in_device_io=True)))
    jobs._check_tensors(call(leaf(4095, in_device_io=False), None))
    with pytest.raises(BadRequest, match=r"parts\[0\]\.x ends at byte 4097 of an I/O block of 4096"):
        jobs._check_tensors(call(leaf(4096, in_device_io=False)))
    with pytest.raises(BadRequest, match=r"parts\[0\]\.x ends at byte 8193 of a block of device memory of 8192"):
        jobs._check_tensors(call(leaf(8192, in_device_io=True)))


def test_device_memory_that_is_not_described_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"parts\[0\]\.x is in device memory, but .* no block of it \(device_io\)"):
        jobs._check_tensors(call(leaf(0, in_device_io=True), None))


def test_room_for_results_lies_inside_the_block_of_device_memory() -> None:
    given = leaf(0, in_device_io=False)
    jobs._check_tensors(call(given, device_out_offset_bytes=4096, device_out_size_bytes=4096))
    with pytest.raises(BadRequest, match="device_out ends at byte 8193 of a block of device memory of 8192"):
        jobs._check_tensors(call(given, device_out_offset_bytes=4097, device_out_size_bytes=4096))


def test_loras_are_components_of_their_job() -> None:
    """So that a loan that ends, ends the jobs that use it."""
    expected = [("t", ComponentKind.TRANSFORMER), ("v", ComponentKind.VAE), ("l", ComponentKind.LORA)]
    assert jobs._components_of(generation(transformer=use())) == expected
    assert jobs._components_of(generation(transformer=use(1, 3))) == expected
    of_call = jobs._components_of(call(leaf(0, in_device_io=True), loras=use()))
    assert of_call == [("c1", ComponentKind.TRANSFORMER), ("l", ComponentKind.LORA)]


def test_a_second_transformer_is_a_component_with_loras_of_its_own() -> None:
    pair = {"transformer": "t", "transformer_2": "t2"}
    asked = generation(pair, transformer_2=use())
    kind = ComponentKind.TRANSFORMER
    assert jobs._components_of(asked) == [("t", kind), ("t2", kind), ("l", ComponentKind.LORA)]
    with pytest.raises(BadRequest, match="a transformer is required"):
        jobs._components_of(generation({"transformer_2": "t2"}))


def test_loras_of_other_roles_and_steps_that_are_none_are_refused() -> None:
    with pytest.raises(BadRequest, match="loras: of the vae: a generation takes LoRAs of its transformers alone"):
        jobs._components_of(generation(vae=use()))
    for steps in ((4,), (2, 2), (3, 1)):
        with pytest.raises(BadRequest, match=r"the strengths of l change at the steps .*: ascending ones below 4"):
            jobs._components_of(generation(transformer=use(*steps)))
    with pytest.raises(BadRequest, match="l has strengths by step: only a generation has steps"):
        jobs._components_of(call(leaf(0, in_device_io=True), loras=use(1)))


def test_controlnets_are_components_of_their_job_and_their_tensors_are_checked() -> None:
    control = Control(component_id="cn", latents=IoTensor(offset_bytes=0, dtype="float32", shape=(1, 4)))
    job = msgspec.structs.replace(generation(), controls=(control,))
    assert ("cn", ComponentKind.CONTROLNET) in jobs._components_of(job)
    outside = msgspec.structs.replace(control, latents=IoTensor(offset_bytes=2**40, dtype="float32", shape=(1,)))
    with pytest.raises(BadRequest, match=r"controls\[0\].latents ends at byte"):
        jobs._check_tensors(msgspec.structs.replace(job, controls=(outside,)))
    beyond = PartControl(component_id="cn", arguments={"x": leaf(2**40, in_device_io=False)})
    part = Part(arguments={}, controls=(beyond,))
    with pytest.raises(BadRequest, match=r"parts\[0\].controls\[0\].x ends at byte"):
        jobs._check_tensors(msgspec.structs.replace(call(leaf(0, in_device_io=False)), parts=(part,)))
