"""Messages and files spoilt at random, random bytes, and the worst that the limits let pass."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import msgpack

from xditd.ipc import limits
from xditd.ipc.codec import encode
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.requests import GetLogs, Hello

ENDING = {"hello", "goodbye", "stop"}
"""Requests that, sound by chance, would leave nothing to be fuzzed; and the one whose record says another version."""
RECORD = Path(__file__).parents[1] / "ipc" / "data" / f"protocol_{PROTOCOL_VERSION}.json"
HELLO = encode(Hello(request_id="r1", protocol_version=PROTOCOL_VERSION, package_version="1", client_name="fuzz"))
SOUND = [
    HELLO,
    encode(GetLogs(request_id="r1", after_line=3)),
    *(bytes.fromhex(text) for op, text in json.loads(RECORD.read_text())["request"].items() if op not in ENDING),
]
"""One of each request, to be spoilt."""
HEADER = json.dumps(
    {f"t{n}": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * n, 16 * n + 16]} for n in range(4)}
).encode()
"""Of a safetensors file."""


def spoil(payload: bytes, rng: random.Random) -> bytes:
    """Change, drop, repeat and insert bytes."""
    spoilt = bytearray(payload)
    for _ in range(rng.randint(1, 6)):
        where = rng.randrange(len(spoilt) + 1)
        deed = rng.randrange(4)
        if deed == 0 and where < len(spoilt):
            spoilt[where] = rng.randrange(256)
        elif deed == 1:
            del spoilt[where : where + rng.randint(1, 16)]
        elif deed == 2:
            spoilt[where:where] = spoilt[where : where + rng.randint(1, 64)] * rng.randint(1, 8)
        else:
            spoilt[where:where] = rng.randbytes(rng.randint(1, 16))
    return bytes(spoilt)


def worst_messages() -> list[bytes]:
    """As much as the limits let pass, of what costs most."""
    rows = (limits.MAX_MESSAGE_BYTES - 3) // (3 + 0x7FFF * 3)
    row = b"\xdc\x7f\xff"
    texts = b"\xdc" + struct.pack(">H", rows) + (row + b"\xa2ab" * 0x7FFF) * rows
    rows = (limits.MAX_MESSAGE_BYTES - 3) // (3 + 0x7FFF)
    many = [b"\xdc" + struct.pack(">H", rows) + (row + item * 0x7FFF) * rows for item in (b"\x80", b"\x90", b"\xc0")]
    deep = b"\x91" * 100_000
    wide = msgpack.packb({"op": "hello", **{f"k{n}": n for n in range(200)}})
    return [texts, *many, deep, wide, b"\xdd\x00\x98\x96\x80" + b"\xc0" * (limits.MAX_MESSAGE_BYTES - 5)]


def hostile_messages(total_bytes: int, rng: random.Random) -> Iterator[bytes]:
    """A session, the worst messages once, and then many small ones until they have ``total_bytes`` together."""
    yield HELLO
    yield from worst_messages()
    sent = 0
    while sent < total_bytes:
        message = rng.randbytes(rng.randint(0, 20_000)) if rng.randrange(20) == 0 else spoil(rng.choice(SOUND), rng)
        sent += len(message)
        yield message


def whole_file(header: bytes) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(header)) + header + bytes(64)


def hostile_file(rng: random.Random) -> bytes:
    """A file of which the header, or anything, is spoilt."""
    return whole_file(spoil(HEADER, rng)) if rng.random() < 0.7 else spoil(whole_file(HEADER), rng)
