"""Make hostile input: randomly mutated messages and files, random bytes, and the worst that the limits allow."""

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

EXCLUDED = {"hello", "goodbye", "stop"}
"""Requests that would end the daemon or the session if a mutation left them valid; ``HELLO`` is added below."""
RECORD = Path(__file__).parents[1] / "ipc" / "data" / f"protocol_{PROTOCOL_VERSION}.json"
HELLO = encode(Hello(request_id="r1", protocol_version=PROTOCOL_VERSION, package_version="1", client_name="fuzz"))
VALID_MESSAGES = [
    HELLO,
    encode(GetLogs(request_id="r1", after_line=3)),
    *(bytes.fromhex(text) for op, text in json.loads(RECORD.read_text())["request"].items() if op not in EXCLUDED),
]
"""One of each request, to mutate."""
HEADER = json.dumps(
    {f"t{n}": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * n, 16 * n + 16]} for n in range(4)}
).encode()
"""JSON header of a safetensors file."""


def mutate(payload: bytes, rng: random.Random) -> bytes:
    """Change, delete, repeat and insert bytes."""
    mutated = bytearray(payload)
    for _ in range(rng.randint(1, 6)):
        where = rng.randrange(len(mutated) + 1)
        action = rng.randrange(4)
        if action == 0 and where < len(mutated):
            mutated[where] = rng.randrange(256)
        elif action == 1:
            del mutated[where : where + rng.randint(1, 16)]
        elif action == 2:
            mutated[where:where] = mutated[where : where + rng.randint(1, 64)] * rng.randint(1, 8)
        else:
            mutated[where:where] = rng.randbytes(rng.randint(1, 16))
    return bytes(mutated)


def worst_messages() -> list[bytes]:
    """Return the largest messages within the limits of the kinds that take most time and memory to decode."""
    rows = (limits.MAX_MESSAGE_BYTES - 3) // (3 + 0x7FFF * 3)
    row = b"\xdc\x7f\xff"
    texts = b"\xdc" + struct.pack(">H", rows) + (row + b"\xa2ab" * 0x7FFF) * rows
    rows = (limits.MAX_MESSAGE_BYTES - 3) // (3 + 0x7FFF)
    many = [b"\xdc" + struct.pack(">H", rows) + (row + item * 0x7FFF) * rows for item in (b"\x80", b"\x90", b"\xc0")]
    deep = b"\x91" * 100_000
    wide = msgpack.packb({"op": "hello", **{f"k{n}": n for n in range(200)}})
    return [texts, *many, deep, wide, b"\xdd\x00\x98\x96\x80" + b"\xc0" * (limits.MAX_MESSAGE_BYTES - 5)]


def hostile_messages(total_bytes: int, rng: random.Random) -> Iterator[bytes]:
    """Yield a hello, the worst messages once, and then small ones of ``total_bytes`` together."""
    yield HELLO
    yield from worst_messages()
    sent = 0
    while sent < total_bytes:
        message = (
            rng.randbytes(rng.randint(0, 20_000)) if rng.randrange(20) == 0 else mutate(rng.choice(VALID_MESSAGES), rng)
        )
        sent += len(message)
        yield message


def whole_file(header: bytes) -> bytes:
    """Return a safetensors file with this header."""
    return struct.pack("<Q", len(header)) + header + bytes(64)


def hostile_file(rng: random.Random) -> bytes:
    """Return a file with a mutated header, or mutated anywhere."""
    return whole_file(mutate(HEADER, rng)) if rng.random() < 0.7 else mutate(whole_file(HEADER), rng)
