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


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


_GGUF_PAIRS = (
    _gguf_text("general.architecture") + struct.pack("<I", 8) + _gguf_text("flux"),
    _gguf_text("general.alignment") + struct.pack("<II", 4, 32),
    _gguf_text("comfy.gguf.orig_shape.t0") + struct.pack("<IIQii", 9, 5, 2, 2, 2),
    _gguf_text("tokens") + struct.pack("<IIQ", 9, 8, 2) + _gguf_text("a") + _gguf_text("bc"),
    _gguf_text("nested") + struct.pack("<IIQIQI", 9, 9, 1, 4, 1, 7),
)
_GGUF_TENSORS = (
    *(_gguf_text(f"t{n}") + struct.pack("<IQIQ", 1, 4, 0, 32 * n) for n in range(3)),
    _gguf_text("q") + struct.pack("<IQQIQ", 2, 32, 2, 8, 96),
)
"""Three of four float32 numbers, and two rows of Q8_0."""
_GGUF_HEADER = struct.pack("<4sIQQ", b"GGUF", 3, len(_GGUF_TENSORS), len(_GGUF_PAIRS)) + b"".join(
    _GGUF_PAIRS + _GGUF_TENSORS
)
GGUF_DATA = -(-len(_GGUF_HEADER) // 32) * 32
"""Where the tensors of :data:`GGUF` begin."""
GGUF = _GGUF_HEADER.ljust(GGUF_DATA, b"\0") + bytes(3 * 32 + 96)
"""A small GGUF file."""


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
    """Return a safetensors file with a mutated header, or mutated anywhere."""
    return whole_file(mutate(HEADER, rng)) if rng.random() < 0.7 else mutate(whole_file(HEADER), rng)


def hostile_gguf(rng: random.Random) -> bytes:
    """Return a GGUF file with a mutated header, or with bytes changed in place, after which more of it is read."""
    if rng.random() < 0.5:
        return mutate(GGUF[:GGUF_DATA], rng) + GGUF[GGUF_DATA:]
    changed = bytearray(GGUF)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(GGUF_DATA)] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
    return bytes(changed)
