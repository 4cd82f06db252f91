"""Encode and decode messages (MessagePack): ``msgpack`` unpacks within limits, then ``msgspec`` validates the struct.

No other code reads a message before both have accepted it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar, get_args

import msgpack
import msgspec

from xditd.ipc import limits
from xditd.ipc.errors import BadMessage, BadRequest
from xditd.ipc.protocol import Message
from xditd.ipc.replies import AnyReply
from xditd.ipc.requests import AnyRequest
from xditd.ipc.worker_messages import AnyCommand, AnyReport

T = TypeVar("T")

_encoder: Final = msgspec.msgpack.Encoder()

_MAX_ARRAY_LEN: Final = 65_536
_MAX_MAP_LEN: Final = limits.MAX_ARGUMENTS
_QUOTED_CHARS: Final = 1_000
"""How much of a bad message an error quotes: a reply with all of it could be too long to send."""


_SMALL_BYTES: Final = min(limits.MAX_MAPS, limits.MAX_ARRAYS)
"""A message up to this size cannot hold too many maps or arrays: each takes a byte."""


class SizeLimits(NamedTuple):
    """The most bytes, and maps and arrays at any depth, of one message."""

    nbytes: int = limits.MAX_MESSAGE_BYTES
    maps: int = limits.MAX_MAPS
    arrays: int = limits.MAX_ARRAYS


class _Builder:
    """Build the maps and arrays of one message, and count them.

    An empty map takes one byte on the wire and at least 64 in memory: without a limit, 8 MiB of them took 0.6 GiB and
    2.4 s. Scalars need no limit: the worst of them, short texts, take 20 bytes in memory for each on the wire.
    """

    __slots__ = ("_arrays", "_maps", "_most")

    def __init__(self, most: SizeLimits) -> None:
        self._most = most
        self._maps = most.maps
        self._arrays = most.arrays

    def map(self, pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
        self._maps -= 1
        if self._maps < 0:
            raise BadMessage(f"more than {self._most.maps} maps in one message")
        return _map_of(pairs)

    def array(self, items: list[Any]) -> list[Any]:
        self._arrays -= 1
        if self._arrays < 0:
            raise BadMessage(f"more than {self._most.arrays} arrays in one message")
        return items


def _map_of(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Build a map, and refuse duplicate keys: msgpack would keep the last one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadMessage(f"key {_first_repeated(pairs)!r:.{_QUOTED_CHARS}} appears twice in one map")
    return found


def _first_repeated(pairs: Sequence[tuple[Any, Any]]) -> Any:
    seen: set[Any] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


def _request_id_of(plain: object) -> str | None:
    """Return the request id of a refused message, if it is valid, so that it can be answered."""
    found = plain.get("request_id") if isinstance(plain, dict) else None
    return found if isinstance(found, str) and 1 <= len(found) <= 64 else None


def encode(message: Message) -> bytes:
    """Encode a message. The fields are not validated: msgspec writes structs as they are.

    Raises:
        BadRequest: a text is not Unicode (such as a file name of other bytes), a number needs more than 64 bits, or a
            value is of a type that no message has.
    """
    try:
        return _encoder.encode(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRequest(f"{type(message).__name__} cannot be sent: {error}") from error


class Decoder(Generic[T]):
    """Decode the messages of one closed union; any other, such as a reply sent as a request, is refused."""

    def __init__(self, union: Any, most: SizeLimits = SizeLimits()) -> None:  # noqa: B008 - it is immutable
        self._union = union
        self._most = most
        self._by_op = {kind.__struct_config__.tag: kind for kind in get_args(union)}

    def decode(self, payload: bytes | memoryview) -> T:
        """Decode one message.

        Raises:
            BadMessage: not MessagePack, beyond a limit, trailing bytes, a duplicate key, an unknown
                ``op`` or field, a value out of range, NaN.
        """
        if len(payload) > self._most.nbytes:
            raise BadMessage(f"message of {len(payload)} bytes; at most {self._most.nbytes} are read")
        if len(payload) > _SMALL_BYTES:
            builder = _Builder(self._most)
            build_map, build_array = builder.map, builder.array
        else:
            build_map, build_array = _map_of, None
        try:
            plain = msgpack.unpackb(
                payload,
                raw=False,
                strict_map_key=True,
                object_pairs_hook=build_map,
                list_hook=build_array,
                max_str_len=limits.MAX_TEXT_CHARS * 4,
                max_bin_len=limits.MAX_MODULE_STATE_BYTES,
                max_array_len=_MAX_ARRAY_LEN,
                max_map_len=_MAX_MAP_LEN,
                max_ext_len=0,
            )
            built: T = msgspec.convert(plain, self._kind_of(plain), strict=True, builtin_types=(bytes,))
        except BadMessage:
            raise
        except msgspec.ValidationError as error:
            refusal = BadMessage(f"not a message of this protocol: {error!s:.{_QUOTED_CHARS}}")
            refusal.request_id = _request_id_of(plain)
            raise refusal from error
        except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
            raise BadMessage(
                f"not MessagePack within limits: {type(error).__name__}: {error!s:.{_QUOTED_CHARS}}"
            ) from error
        return built

    def warm_up(self, *kinds: type[Message]) -> None:
        """Have msgspec analyse messages of these kinds, by default of all, instead of at the first of each.

        That takes up to 3 ms for one, and a first lend has four.
        """
        for kind in kinds or self._by_op.values():
            with contextlib.suppress(msgspec.ValidationError):
                msgspec.convert({}, kind, strict=True, builtin_types=(bytes,))

    def _kind_of(self, plain: object) -> Any:
        """Return the struct that ``op`` names, or the whole union, for which msgspec raises the error.

        msgspec caches its analysis of a struct, but analyses a union in every call: 34 us instead of 3.
        """
        op = plain.get("op") if isinstance(plain, dict) else None
        return self._by_op.get(op, self._union) if isinstance(op, str) else self._union


request_decoder: Decoder[AnyRequest] = Decoder(AnyRequest)
reply_decoder: Decoder[AnyReply] = Decoder(AnyReply)
command_decoder: Decoder[AnyCommand] = Decoder(
    AnyCommand, SizeLimits(limits.MAX_COMMAND_BYTES, limits.MAX_COMMAND_MAPS, limits.MAX_COMMAND_ARRAYS)
)
report_decoder: Decoder[AnyReport] = Decoder(AnyReport)
