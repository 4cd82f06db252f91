"""``Record``: how a picture or a video was made, as the JSON text that lies in its file.

It has base names of files and no folders, no name of a user or a host, and no time.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.loras import MAX_SCALE

SCHEMA: Final = 3
"""The version of the record. A field more or less makes another one."""

MAX_BYTES: Final = 2**20
"""Longer records are neither written nor read."""

_Prompt = Annotated[str, Meta(max_length=limits.MAX_TEXT_CHARS)]
_ShortName = Annotated[str, Meta(min_length=1, max_length=255)]
_BaseName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^(?!\.\.?$)[^/\x00-\x1f]+$")]
_Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
_Side = Annotated[int, Meta(ge=1, le=limits.MAX_SIDE_PIXELS)]
_Strength = Annotated[float, Meta(ge=-MAX_SCALE, le=MAX_SCALE)]
_Step = Annotated[int, Meta(ge=0, le=limits.MAX_STEPS)]
_Schedule = Annotated[tuple[tuple[_Step, _Strength], ...], Meta(min_length=1, max_length=limits.MAX_STEPS)]
_Unit = Annotated[float, Meta(ge=0, le=1)]
_Option = bool | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | Annotated[float, Meta(ge=-1e300, le=1e300)]


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class FileRecord(_Struct, frozen=True, kw_only=True):
    """A file by what is in it: its base name, its size, and hashes (:mod:`~xditd.client.metadata.file_hashes`)."""

    name: _BaseName
    bytes: Annotated[int, Meta(ge=0, le=limits.MAX_BYTES)] | None = None
    sample: _Digest | None = None
    """SHA-256 of the size and of 64 pieces of the file, evenly spread."""
    sha256: _Digest | None = None
    """SHA-256 of all bytes, of a file of at most 256 MiB."""


_Files = Annotated[tuple[FileRecord, ...], Meta(max_length=limits.MAX_BLOCKS)]


class LoraRecord(_Struct, frozen=True, kw_only=True):
    """A LoRA with its strength: one for all steps, or pairs ``(step, strength)``, each from that step on.

    ``roles`` are those of the parts whose layers it changed: ``transformer``, ``transformer_2``, text encoders. Records
    of schema 1 have none.
    """

    file: FileRecord
    strength: _Strength | _Schedule
    roles: Annotated[tuple[_ShortName, ...], Meta(max_length=32)] = ()


class ModelRecord(_Struct, frozen=True, kw_only=True):
    """The model: its name, the family of its transformer, and the files of its parts by their roles."""

    name: _ShortName | None = None
    family: _ShortName | None = None
    files: Annotated[dict[_ShortName, _Files], Meta(max_length=32)] = msgspec.field(default_factory=dict)


class InputsRecord(_Struct, frozen=True, kw_only=True):
    """What else a generation was made from, which a record does not hold: how many of each."""

    image: Annotated[int, Meta(ge=0, le=limits.MAX_BATCH)] = 0
    mask: Annotated[int, Meta(ge=0, le=limits.MAX_BATCH)] = 0
    last_image: Annotated[int, Meta(ge=0, le=limits.MAX_BATCH)] = 0
    references: Annotated[int, Meta(ge=0, le=limits.MAX_BATCH)] = 0
    control: Annotated[int, Meta(ge=0, le=limits.MAX_BATCH)] = 0
    embeds: FileRecord | None = None
    """The file of text embeddings in place of a prompt."""
    noise: bool = False
    """Whether the noise was the caller's own, and no seed repeats it."""
    conditioning: bool = False
    """Whether the text embeddings were the caller's own tensors."""
    sigmas: bool = False
    """Whether the schedule was the caller's own."""


class Record(_Struct, frozen=True, kw_only=True):
    """How one picture or video was made. ``index`` is its place among the ``num_images`` that were made at once."""

    xditd: Annotated[int, Meta(ge=1, le=SCHEMA)] = SCHEMA
    version: Annotated[str, Meta(max_length=64)]
    """The version of xditd."""
    prompt: _Prompt | None = None
    prompt_2: _Prompt | None = None
    """What a second text encoder read in place of the prompt."""
    negative_prompt: _Prompt | None = None
    max_sequence_length: Annotated[int, Meta(ge=1, le=limits.MAX_TEXT_TOKENS)] | None = None
    """To how many tokens prompts were padded or cut, if it was not the model's own number."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    index: Annotated[int, Meta(ge=0, lt=limits.MAX_BATCH)] = 0
    num_images: Annotated[int, Meta(ge=1, le=limits.MAX_BATCH)] = 1
    width: _Side
    height: _Side
    frames: Annotated[int, Meta(ge=1, le=limits.MAX_FRAMES)] = 1
    fps: Annotated[int, Meta(ge=1, le=1_000)] | None = None
    steps: Annotated[int, Meta(ge=1, le=limits.MAX_STEPS)]
    guidance: Annotated[float, Meta(ge=0, le=limits.MAX_GUIDANCE)] | None = None
    strength: _Unit | None = None
    """Of a generation from a picture: how much of it is made anew."""
    step_cache: _Unit = 0.0
    options: Annotated[dict[_ShortName, _Option], Meta(max_length=limits.MAX_ARGUMENTS)] = msgspec.field(
        default_factory=dict
    )
    variant: _ShortName | None = None
    compute_dtype: _ShortName | None = None
    random_embeds: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """The seed of random embeddings in place of a prompt."""
    text_tokens: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    """The number of those."""
    model: ModelRecord = msgspec.field(default_factory=ModelRecord)
    loras: Annotated[tuple[LoraRecord, ...], Meta(max_length=limits.MAX_LORAS)] = ()
    inputs: InputsRecord = msgspec.field(default_factory=InputsRecord)


def encode(record: Record) -> str:
    """Return the record as JSON on one line, as files hold it. The version of the schema comes first.

    Raises:
        BadRequest: a value that no record may have, such as a prompt of more than 65,536 characters.
    """
    # The version is a default, and has to be there all the same.
    stored = {name: value for name, value in msgspec.to_builtins(record).items() if value != {}}
    built: dict[str, Any] = {"xditd": record.xditd, **stored}
    try:
        msgspec.convert(built, type=Record)
        text = msgspec.json.encode(built).decode()
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise BadRequest(f"metadata: {error}; save with metadata=False (--no-metadata)") from error
    if len(text.encode()) > MAX_BYTES:
        raise BadRequest(f"metadata: more than {MAX_BYTES} bytes; save with metadata=False (--no-metadata)")
    return text


def decode(text: bytes, where: str) -> Record:
    """Return the record of a JSON text from a file, which errors call ``where``.

    Raises:
        BadRequest: no JSON of a record, or one of a newer schema.
    """
    if len(text) > MAX_BYTES:
        raise BadRequest(f"{where}: its metadata have more than {MAX_BYTES} bytes; a record of xditd has less")
    try:
        plain = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRequest(f"{where}: its metadata are no JSON: {error!s:.200}") from error
    schema = plain.get("xditd") if isinstance(plain, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise BadRequest(
            f"{where}: its metadata are of schema {schema}, and this xditd reads {SCHEMA}; install a newer xditd"
        )
    if schema is None:
        raise BadRequest(f"{where}: its metadata are no record of xditd")
    try:
        return msgspec.convert(plain, type=Record)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadRequest(f"{where}: its metadata are no record of xditd: {error!s:.200}") from error
