"""Recorded messages: a change of a message without an increase of the protocol version fails here."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from xditd.ipc import codec
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.replies import StepDone
from xditd.ipc.requests import Lend
from xditd.ipc.tensors import ComponentKind, CopiedBytes, FileBlock, Fingerprint, HostShmBlock, Manifest, TensorSpec
from xditd.ipc.worker_messages import CancelRun, IoDigested

DATA = Path(__file__).parent / "data"
REMEDY = "a message changed: raise PROTOCOL_VERSION and run record_protocol.py"


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((DATA / f"protocol_{PROTOCOL_VERSION}.json").read_text())
    return found


def test_every_message_reads_and_writes_its_recorded_bytes(
    recorded: dict[str, dict[str, str]], messages: ModuleType, union: str, message_class: type[msgspec.Struct]
) -> None:
    payload = bytes.fromhex(recorded[union][str(message_class.__struct_config__.tag)])
    expected = messages.instance(message_class)
    assert getattr(codec, f"{union}_decoder").decode(payload) == expected, REMEDY
    assert codec.encode(expected) == payload, REMEDY


def test_the_record_knows_no_message_that_is_gone(recorded: dict[str, dict[str, str]], messages: ModuleType) -> None:
    for name, union in messages.UNIONS.items():
        assert set(recorded[name]) == {cls.__struct_config__.tag for cls in messages.classes(union)}, REMEDY


# One message of each union, bytes and struct, written out without the builder above.
SPELLED_OUT: list[tuple[str, Any, bytes]] = [
    (
        "reply",
        StepDone(request_id="r7", step=3, total_steps=28, elapsed_s=0.5),
        b"\x85\xa2op\xa9step_done\xaarequest_id\xa2r7\xa4step\x03\xabtotal_steps\x1c\xa9elapsed_s\xcb?\xe0" + bytes(6),
    ),
    (
        "command",
        CancelRun(op_number=258, target_op_number=1),
        b"\x83\xa2op\xaacancel_run\xa9op_number\xcd\x01\x02\xb0target_op_number\x01",
    ),
    (
        "report",
        IoDigested(group_token="token-01", rank=1, op_number=5, digest=bytes(range(16))),
        b"\x85\xa2op\xabio_digested\xabgroup_token\xa8token-01\xa4rank\x01\xa9op_number\x05\xa6digest\xc4\x10"
        + bytes(range(16)),
    ),
    (
        "request",
        Lend(
            request_id="r1",
            manifest=Manifest(
                kind=ComponentKind.VAE,
                label="ae",
                blocks=(
                    HostShmBlock(
                        fd=9, inode=77, size_bytes=4096, fingerprint=Fingerprint(length_bytes=0, digest=b"d" * 16)
                    ),
                    FileBlock(
                        fd=10,
                        path="/m/ae.safetensors",
                        device=1,
                        inode=2**64 - 1,
                        mtime_ns=-1,
                        ctime_ns=5,
                        size_bytes=256,
                        fingerprint=Fingerprint(offset_bytes=1, length_bytes=2, digest=b"e" * 16),
                    ),
                ),
                tensors=(
                    TensorSpec("a", "bfloat16", (2, 3), 0, 256),
                    TensorSpec("b", "float32", (2, 3), 1, 0, (1, 2)),
                ),
                generation=2,
            ),
            copied=CopiedBytes(host_to_host=5),
            changed=("b",),
        ),
        b"\x85\xa2op\xa4lend\xaarequest_id\xa2r1\xa8manifest\x89\xa4kind\xa3vae\xa6module\xc0\xa5label\xa2ae\xa6blocks\x92"
        b"\x85\xa4tier\xa8host_shm\xa2fd\x09\xa5inode\x4d\xaasize_bytes\xcd\x10\x00"
        b"\xabfingerprint\x83\xacoffset_bytes\x00\xaclength_bytes\x00\xa6digest\xc4\x10" + b"d" * 16 + b"\x89\xa4tier"
        b"\xa4file\xa2fd\x0a\xa4path\xb1/m/ae.safetensors\xa6device\x01\xa5inode\xcf"
        + b"\xff"
        * 8
        + b"\xa8mtime_ns\xff\xa8ctime_ns\x05"
        b"\xaasize_bytes\xcd\x01\x00\xabfingerprint\x83\xacoffset_bytes\x01\xaclength_bytes\x02\xa6digest\xc4\x10"
        + b"e"
        * 16
        + b"\xa7tensors\x92\x96\xa1a\xa8bfloat16\x92\x02\x03\x00\xcd\x01\x00\xc0\x96\xa1b\xa7float32"
        b"\x92\x02\x03\x01\x00\x92\x01\x02\xa6packed\x90\xadcompute_dtype\xc0\xa4lora\xc0\xaageneration\x02\xa6copied\x84\xachost_to_host\x05\xaehost_to_device\x00"
        b"\xb0device_to_device\x00\xa4peer\x00\xa7changed\x91\xa1b",
    ),
]


@pytest.mark.parametrize(("union", "message", "payload"), SPELLED_OUT, ids=[row[0] for row in SPELLED_OUT])
def test_spelled_out_messages(union: str, message: Any, payload: bytes) -> None:
    assert codec.encode(message) == payload
    assert getattr(codec, f"{union}_decoder").decode(payload) == message
