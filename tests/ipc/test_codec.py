"""The codec accepts only valid messages of its union, and raises only ``BadMessage``."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import msgpack
import msgspec
import pytest

from xditd.ipc import codec, limits
from xditd.ipc.arguments import Argument, InIo, Kept, ListOf, MapOf, Repeated, Rows, TupleOf, Values
from xditd.ipc.errors import BadMessage, BadRequest
from xditd.ipc.job_parts import Part
from xditd.ipc.replies import Called, Failed
from xditd.ipc.requests import Call, Generate, GetStatus, Hello, Lend
from xditd.ipc.tensors import Manifest, TensorSpec

DECODERS: dict[str, codec.Decoder[Any]] = {
    "request": codec.request_decoder,
    "reply": codec.reply_decoder,
    "command": codec.command_decoder,
    "report": codec.report_decoder,
}
STATUS = {"op": "get_status", "request_id": "r1"}


def refused(payload: bytes) -> str:
    with pytest.raises(BadMessage) as caught:
        codec.request_decoder.decode(payload)
    return caught.value.detail


def packed(plain: Any) -> bytes:
    found = msgpack.packb(plain, use_bin_type=True)
    assert isinstance(found, bytes)
    return found


def as_map(message: msgspec.Struct) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,))
    return found


def test_round_trip(messages: ModuleType, union: str, message_class: type[msgspec.Struct]) -> None:
    message = messages.instance(message_class)
    back = DECODERS[union].decode(codec.encode(message))
    assert back == message
    assert type(back) is message_class
    assert DECODERS[union].decode(memoryview(codec.encode(message))) == message


def test_other_unions_refuse_it(messages: ModuleType, union: str, message_class: type[msgspec.Struct]) -> None:
    payload = codec.encode(messages.instance(message_class))
    for name, decoder in DECODERS.items():
        if name != union:
            with pytest.raises(BadMessage):
                decoder.decode(payload)


def test_an_unknown_field_is_refused(messages: ModuleType, union: str, message_class: type[msgspec.Struct]) -> None:
    plain = as_map(messages.instance(message_class)) | {"surprise": 1}
    with pytest.raises(BadMessage, match="surprise"):
        DECODERS[union].decode(packed(plain))


def test_wrong_types_are_refused(messages: ModuleType, union: str, message_class: type[msgspec.Struct]) -> None:
    """No field takes a map of something else, and none that must be there may be left out."""
    plain = as_map(messages.instance(message_class))
    required = {field.encode_name for field in msgspec.structs.fields(message_class) if field.required}
    for name in plain:
        with pytest.raises(BadMessage):
            DECODERS[union].decode(packed(plain | {name: {"not": ["a", "value"]}}))
        if name in required or name == "op":
            with pytest.raises(BadMessage):
                DECODERS[union].decode(packed({key: value for key, value in plain.items() if key != name}))


def test_every_float_is_bounded(messages: ModuleType, union: str, message_class: type[msgspec.Struct]) -> None:
    """Unbounded floats let NaN and infinities pass."""
    for path, meta in messages.floats(message_class, message_class.__name__):
        assert meta is not None, path
        assert meta.ge is not None, path
        assert meta.le is not None, path


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.001, 1001.0])
def test_floats_that_are_no_guidance_are_refused(messages: ModuleType, value: float) -> None:
    plain = as_map(messages.instance(Generate))
    assert "guidance_scale" in refused(packed(plain | {"sampling": plain["sampling"] | {"guidance_scale": value}}))


def test_every_kind_of_argument_comes_back_as_it_was(messages: ModuleType) -> None:
    values = Values(dtype="bfloat16", shape=(2,), values=(0.5, -1.0))
    kept = Kept(kept_id="k1", dtype="int64", shape=())
    place = InIo(offset_bytes=256, dtype="float8_e4m3fn", shape=(1, 2), kept_id="k2")
    arguments: dict[str, Argument] = {
        "nothing": None,
        "numbers": TupleOf(items=(True, -(2**63), 2**63 - 1, 1e-300, "text")),
        "nested": ListOf(items=(MapOf(items={"a": place, "b": ListOf(items=())}), values)),
        "rows": Rows(parts=(Repeated(tensor=kept, times=3), Repeated(tensor=place), Repeated(tensor=values))),
    }
    call = messages.instance(Call, parts=(Part(arguments=arguments), Part(arguments={})))
    assert codec.request_decoder.decode(codec.encode(call)) == call
    generate = messages.instance(Generate, conditioning=arguments)
    assert codec.request_decoder.decode(codec.encode(generate)) == generate
    called = messages.instance(Called, results=(*arguments.values(), None))
    assert codec.reply_decoder.decode(codec.encode(called)) == called


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_floats_in_arguments_are_finite(messages: ModuleType, value: float) -> None:
    plain = as_map(messages.instance(Call))
    leaf = {"leaf": "values", "dtype": "float32", "shape": [1], "values": [value]}
    for spoilt in (value, leaf, {"leaf": "list", "items": [1, leaf]}, {"leaf": "map", "items": {"a": value}}):
        assert "arguments" in refused(packed(plain | {"parts": [{"arguments": {"x": spoilt}}]}))
    assert "foreseen" in refused(packed(plain | {"foreseen": {"timestep": [value]}}))


@pytest.mark.parametrize(
    "leaf",
    [
        {"leaf": "code", "items": []},
        {"items": []},
        {"leaf": "io", "dtype": "float32", "shape": [1]},
        {"leaf": "io", "offset_bytes": -1, "dtype": "float32", "shape": [1]},
        {"leaf": "io", "offset_bytes": 0, "dtype": "complex32", "shape": [1]},
        {"leaf": "kept", "kept_id": "", "dtype": "float32", "shape": [1]},
        {"leaf": "rows", "parts": []},
        {"leaf": "values", "dtype": "float32", "shape": [1], "values": [0.0] * (limits.MAX_ARGUMENT_VALUES + 1)},
        {"leaf": "list", "items": [None] * (limits.MAX_ARGUMENTS + 1)},
        {"leaf": "map", "items": {"a": {"leaf": "values", "dtype": "float32", "shape": [1], "values": ["b"]}}},
        b"bytes",
        2**64 - 1,
        "x" * (limits.MAX_NAME_CHARS + 1),
    ],
)
def test_arguments_that_are_none_are_refused(messages: ModuleType, leaf: Any) -> None:
    plain = as_map(messages.instance(Call))
    assert "arguments" in refused(packed(plain | {"parts": [{"arguments": {"x": leaf}}]}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 10**9),
        ("steps", 4.0),
        ("steps", True),
        ("steps", "4"),
        ("height", 0),
        ("height", -8),
        ("height", 2**63),
        ("width", limits.MAX_SIDE_PIXELS + 1),
        ("variant", ""),
        ("variant", None),
        ("seed", -1),
        ("seed", 2**64 - 1),
        ("sigmas", [0.5] * (limits.MAX_STEPS + 1)),
        ("sigmas", [1.5]),
        ("options", {"shift": float("nan")}),
        ("options", {"shift": "3"}),
    ],
)
def test_samplings_out_of_range_are_refused(messages: ModuleType, field: str, value: Any) -> None:
    plain = as_map(messages.instance(Generate))
    assert field in refused(packed(plain | {"sampling": plain["sampling"] | {field: value}}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", ""),
        ("request_id", "x" * 65),
        ("request_id", b"r1"),
        ("components", None),
        ("components", {"unet": "c1"}),
        ("components", {"transformer": ""}),
        ("conditioning", [1]),
        ("sampling", None),
    ],
)
def test_values_out_of_range_are_refused(messages: ModuleType, field: str, value: Any) -> None:
    assert field in refused(packed(as_map(messages.instance(Generate)) | {field: value}))


def test_a_refusal_names_whom_to_answer(messages: ModuleType) -> None:
    plain = as_map(messages.instance(Generate))
    for changed, expected in (
        ({"sampling": None}, plain["request_id"]),
        ({"request_id": 7}, None),
        ({"op": "x"}, "xxxx"),
    ):
        with pytest.raises(BadMessage) as caught:
            codec.request_decoder.decode(packed(plain | changed))
        assert caught.value.request_id == expected


def test_unknown_and_missing_op_are_refused() -> None:
    assert "launch" in refused(packed({"op": "launch", "request_id": "r1"}))
    refused(packed({"request_id": "r1"}))
    refused(packed({"op": 3, "request_id": "r1"}))
    refused(packed({b"op": "get_status", b"request_id": "r1"}))
    refused(packed(["get_status", "r1"]))
    refused(packed({1: "get_status"}))


def test_a_message_at_the_limit_is_read_and_one_byte_more_is_not() -> None:
    filler = b"\xc1" * (limits.MAX_MESSAGE_BYTES + 1)
    assert f"at most {limits.MAX_MESSAGE_BYTES}" in refused(filler)
    assert "at most" not in refused(filler[:-1])


def test_trailing_bytes_and_truncation_are_refused() -> None:
    payload = packed(STATUS)
    codec.request_decoder.decode(payload)
    assert "ExtraData" in refused(payload + b"\xc0")
    assert "ExtraData" in refused(payload + payload)
    for length in range(len(payload)):
        refused(payload[:length])


def test_duplicate_keys_are_refused_wherever_they_are(messages: ModuleType) -> None:
    twice = b"\x83" + packed(STATUS)[1:] + b"\xa2op\xa4stop"
    assert "twice" in refused(twice)
    lend = codec.encode(messages.instance(Lend))
    inner = lend.replace(b"\x89\xa4kind", b"\x8a\xa4kind\xa3vae\xa4kind")
    assert inner != lend
    assert "twice" in refused(inner)


@pytest.mark.parametrize("shape", ["arrays", "maps"])
def test_deep_nesting_is_refused(shape: str) -> None:
    for depth in (600, 100_000):
        deep = b"\x91" * depth if shape == "arrays" else b"\x81\xa1k" * depth
        refused(deep + b"\xc0")
        refused(b"\x83" + packed(STATUS)[1:] + b"\xa1x" + deep + b"\xc0")


def test_headers_that_promise_millions_of_items_allocate_nothing() -> None:
    ten_million = (10_000_000).to_bytes(4, "big")
    for kind in (b"\xdd", b"\xdf", b"\xdb", b"\xc6"):  # array, map, text and bytes with 32-bit lengths
        refused(kind + ten_million)
        refused(kind + b"\xff" * 4)
        refused(kind + ten_million + b"\xc0" * (limits.MAX_MESSAGE_BYTES - 5))


@pytest.mark.parametrize(
    ("item", "limit", "named"),
    [
        (b"\x80", limits.MAX_MAPS, "maps"),
        (b"\x81\xa1k\xc0", limits.MAX_MAPS, "maps"),
        (b"\x90", limits.MAX_ARRAYS, "arrays"),
    ],
)
def test_many_small_containers_are_refused_before_they_fill_the_memory(item: bytes, limit: int, named: str) -> None:
    """One byte on the wire, seventy in memory: a full message of them took 0.6 GiB and seconds."""
    row = b"\xdc\x40\x00" + item * 0x4000
    rows = limits.MAX_MESSAGE_BYTES // len(row) - 1
    tracemalloc.start()
    try:
        assert f"more than {limit} {named}" in refused(b"\xdc" + rows.to_bytes(2, "big") + row * rows)
        assert tracemalloc.get_traced_memory()[1] < 3 * limits.MAX_MESSAGE_BYTES + 2**24  # the message itself, mostly
    finally:
        tracemalloc.stop()


def test_extension_types_are_refused() -> None:
    for ext in (
        b"\xd4\x01x",
        b"\xc7\x00\x05",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\xc7\x0c\xff" + bytes(12),
        b"\xc7\x00\xff",
    ):
        refused(ext)
        refused(b"\x83" + packed(STATUS)[1:] + b"\xa1x" + ext)


def test_text_that_is_not_unicode_is_refused() -> None:
    refused(packed(STATUS).replace(b"\xa2r1", b"\xa2\xff\xfe"))
    refused(packed(STATUS).replace(b"\xa2r1", b"\xa3\xed\xa0\x80"))  # a lone surrogate in UTF-8


def mutations(payload: bytes, rng: random.Random) -> Iterator[bytes]:
    for _ in range(400):
        spoilt = bytearray(payload)
        for _ in range(rng.randint(1, 4)):
            where = rng.randrange(len(spoilt))
            match rng.randrange(3):
                case 0:
                    spoilt[where] = rng.randrange(256)
                case 1:
                    del spoilt[where : where + rng.randint(1, 8)]
                case _:
                    spoilt[where:where] = rng.randbytes(rng.randint(1, 8))
            if not spoilt:
                break
        yield bytes(spoilt)


def test_random_bytes_raise_nothing_but_bad_message(messages: ModuleType) -> None:
    rng = random.Random(20)
    noise = (rng.randbytes(rng.randint(0, 200)) for _ in range(4_000))
    seeds = [
        codec.encode(messages.instance(cls)) for union in messages.UNIONS.values() for cls in messages.classes(union)
    ]
    spoilt = itertools.chain.from_iterable(mutations(seed, rng) for seed in seeds)
    refusals = longest = 0
    for payload in itertools.chain(noise, spoilt):
        for decoder in DECODERS.values():
            try:
                message = decoder.decode(payload)
            except BadMessage as error:
                longest = max(longest, len(error.detail))
                refusals += 1
            else:
                assert decoder.decode(codec.encode(message)) == message
    assert refusals > 10_000
    assert longest <= limits.MAX_TEXT_CHARS


def test_a_refusal_of_long_text_still_fits_into_a_reply(messages: ModuleType) -> None:
    long = "k" * (limits.MAX_TEXT_CHARS * 3)
    twice = b"\x82" + (packed(long) + b"\xc0") * 2
    for payload in (packed(STATUS | {long: 1}), packed({"op": long}), twice):
        reply = Failed(request_id="r1", code="bad_message", detail=refused(payload))
        assert codec.reply_decoder.decode(codec.encode(reply)) == reply


def test_the_largest_manifest_fits() -> None:
    """The limits must not contradict each other."""
    names = [
        f"model.diffusion_model.single_blocks.{number}.modulation.lin.weight" for number in range(limits.MAX_TENSORS)
    ]
    tensors = tuple(TensorSpec(name, "bfloat16", (3072, 3072), 0, 256 * at) for at, name in enumerate(names))
    sound = msgspec.convert(
        {"request_id": "r", "op": "lend", "manifest": _manifest(tensors)}, Lend, builtin_types=(bytes,)
    )
    assert codec.request_decoder.decode(codec.encode(sound)) == sound


def _manifest(tensors: tuple[TensorSpec, ...]) -> dict[str, Any]:
    print_ = {"offset_bytes": 0, "length_bytes": 0, "digest": bytes(16)}
    block = {
        "tier": "cuda_ipc",
        "device_uuid": "GPU-0",
        "handle": bytes(64),
        "size_bytes": 2**40,
        "fingerprint": print_,
    }
    plain: dict[str, Any] = {"kind": "vae", "label": "x", "blocks": [block] * limits.MAX_BLOCKS}
    plain["tensors"] = msgspec.to_builtins(tensors)
    assert msgspec.convert(plain, Manifest, builtin_types=(bytes,))
    return plain


def test_what_cannot_be_encoded_is_a_bad_request() -> None:
    """A caller may pass a file name that is not Unicode, or a huge number."""
    hello = Hello(request_id="r1", protocol_version=1, package_version="1", client_name="caf\udce9")
    with pytest.raises(BadRequest, match="Hello"):
        codec.encode(hello)
    with pytest.raises(BadRequest, match="Hello"):
        codec.encode(msgspec.structs.replace(hello, client_name="x", protocol_version=2**70))


def test_bytes_stay_bytes(messages: ModuleType) -> None:
    plain = msgpack.unpackb(codec.encode(messages.instance(Lend)))
    assert isinstance(plain["manifest"]["blocks"][0]["handle"], bytes)


def test_decoding_is_stable_across_threads(messages: ModuleType) -> None:
    from concurrent.futures import ThreadPoolExecutor

    payload = codec.encode(GetStatus(request_id="r1"))
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(codec.request_decoder.decode, [payload] * 200)) == {GetStatus(request_id="r1")}


def test_the_first_message_of_a_kind_costs_no_analysis_after_a_warm_up() -> None:
    """msgspec keeps its analysis with the struct, so each way has a process of its own: seconds of the processor."""
    program = """
import contextlib, sys, time
from xditd.ipc import codec, errors
if sys.argv[1] == "warm":
    codec.request_decoder.warm_up()
began_s = time.thread_time()
with contextlib.suppress(errors.BadMessage):
    codec.request_decoder.decode(bytes.fromhex(sys.argv[2]))
print(time.thread_time() - began_s)
"""
    payload = packed({"op": "lend"}).hex()
    cold_s, warm_s = (
        min(
            float(subprocess.run([sys.executable, "-c", program, way, payload], capture_output=True, check=True).stdout)
            for _ in range(2)
        )
        for way in ("cold", "warm")
    )
    assert warm_s < cold_s / 4


def test_a_warm_up_accepts_nothing() -> None:
    for decoder in DECODERS.values():
        decoder.warm_up()
    assert "op" in refused(packed({}))
