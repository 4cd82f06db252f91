"""Base classes of all messages, common field types, and the protocol version."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from xditd.ipc import limits

PROTOCOL_VERSION: Final = 35
"""Increased with every change of a message, since unknown fields are refused. Not the package's version."""

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
ComponentId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=limits.MAX_TEXT_CHARS)]
ErrorNames = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=limits.MAX_ERROR_NAME_CHARS)], ...],
    msgspec.Meta(max_length=limits.MAX_ERROR_NAMES),
]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
MAX_RELATIVE_ERROR: Final = 1e6
RelativeError = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_RELATIVE_ERROR)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]
TimingsMs = Annotated[dict[str, Milliseconds], msgspec.Meta(max_length=64)]


class Message(msgspec.Struct, tag_field="op", frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every message: immutable, tagged by ``op``; unknown fields are refused."""


class Request(Message, frozen=True, kw_only=True):
    """Base of a client's requests. Each has one reply type, or ``Failed``; events may come before the reply."""

    request_id: RequestId


class Reply(Message, frozen=True, kw_only=True):
    """Base of replies and events, which answer the request of the same ``request_id``."""

    request_id: RequestId
