"""Find the record in a PNG, a JPEG, a WebP or an MP4 file, and make what holds it there.

| format | where |
|---|---|
| PNG | an ``iTXt`` chunk ``xditd``; compressed ones, ``tEXt`` and ``zTXt`` are read, too |
| JPEG, WebP | the ``UserComment`` of EXIF, in ASCII |
| MP4 | the comment of the file (``©cmt``) |

Files come from anywhere: only the heads of other parts are read, nothing is decoded, and sizes are bounded.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from xditd.client.metadata.record import MAX_BYTES
from xditd.ipc.addresses import user_path
from xditd.ipc.errors import BadRequest

if TYPE_CHECKING:
    from PIL import PngImagePlugin

KEYWORD: Final = "xditd"
MAX_JPEG_BYTES: Final = 65_000
"""The longest record of a JPEG, whose segments have at most 65,533 bytes."""

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_EXIF_IFD: Final = 0x8769
_USER_COMMENT: Final = 0x9286
_ASCII: Final = b"ASCII\0\0\0"
_MAX_PARTS: Final = 100_000
"""Chunks, segments or boxes that are looked at."""
_MAX_STORED_BYTES: Final = MAX_BYTES + 4_096


def find_text(path: str | os.PathLike[str]) -> bytes:
    """Return the JSON text of the record in a file.

    Raises:
        BadRequest: the file cannot be read, is of another format or malformed, or has no record.
    """
    target = user_path(path)
    with _open(target) as file:
        start = file.read(16)
        if start.startswith(_PNG):
            found = _in_png(file, target)
        elif start.startswith(b"\xff\xd8\xff"):
            found = _in_jpeg(file, target)
        elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
            found = _in_webp(file, target)
        elif start[4:8] == b"ftyp":
            found = _in_mp4(file, target)
        else:
            raise BadRequest(f"{target}: neither PNG, JPEG, WebP nor MP4; only these say how they were made")
    if found is None:
        raise BadRequest(
            f"{target}: has no record of how it was made: it is of another program, was saved without metadata, or a "
            "program that changed it has removed them"
        )
    return found


def png_info(text: str) -> PngImagePlugin.PngInfo:
    """Return what Pillow's PNG encoder takes as ``pnginfo`` for this record."""
    from PIL import PngImagePlugin

    found = PngImagePlugin.PngInfo()
    found.add_itxt(KEYWORD, text)
    return found


def exif(text: str, *, is_jpeg: bool) -> bytes:
    """Return the EXIF block of a JPEG or a WebP file with this record.

    Raises:
        BadRequest: it is too long for a JPEG.
    """
    from PIL import Image

    # Readers disagree on the byte order of the other charsets.
    ascii_text = json.dumps(json.loads(text), ensure_ascii=True, separators=(",", ":")).encode("ascii")
    if is_jpeg and len(ascii_text) > MAX_JPEG_BYTES:
        raise BadRequest(
            f"metadata: {len(ascii_text)} bytes, and a JPEG holds {MAX_JPEG_BYTES}; save it as .png or .webp, or with "
            "metadata=False (--no-metadata)"
        )
    found = Image.Exif()
    found.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + ascii_text
    return found.tobytes()


def _open(target: Path) -> BinaryIO:
    try:
        file = open(os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")  # noqa: SIM115 - the caller closes
    except (OSError, ValueError) as error:
        raise BadRequest(f"{target}: {getattr(error, 'strerror', None) or error}; name a picture or a video") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadRequest(f"{target}: not a regular file; name a picture or a video")
    return file


def _malformed(target: Path, what: str) -> BadRequest:
    return BadRequest(f"{target}: malformed: {what}")


def _read(file: BinaryIO, length: int, target: Path) -> bytes:
    """Read a part that may hold the record.

    Raises:
        BadRequest: it is longer than a record can be, or the file ends before.
    """
    if length > _MAX_STORED_BYTES:
        raise BadRequest(f"{target}: its metadata have {length} bytes; at most {MAX_BYTES} are read")
    found = file.read(length)
    if len(found) != length:
        raise _malformed(target, "it ends within its metadata")
    return found


def _in_png(file: BinaryIO, target: Path) -> bytes | None:
    file.seek(len(_PNG))
    for _ in range(_MAX_PARTS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return None
        length = int.from_bytes(head[:4], "big")
        after = file.tell() + length + 4
        if head[4:] in (b"iTXt", b"tEXt", b"zTXt"):
            # Other programs' texts may be long; only ours is read as a whole.
            keyword = file.read(min(length, 80)).split(b"\0", 1)[0]
            if keyword == KEYWORD.encode():
                file.seek(after - length - 4)
                return _png_text(head[4:], _read(file, length, target), target)
        file.seek(after)
    raise _malformed(target, f"more than {_MAX_PARTS} chunks")


def _png_text(kind: bytes, data: bytes, target: Path) -> bytes:
    """Return the text of a chunk: ``keyword NUL text``, with a method and languages in between for some."""
    text = data.split(b"\0", 1)[1] if b"\0" in data else b""
    if kind == b"tEXt":
        return text
    if kind == b"zTXt":
        return _inflate(text[1:], target)
    is_compressed, rest = text[:1] == b"\1", text[2:].split(b"\0", 2)
    if len(rest) != 3:
        raise _malformed(target, "a text chunk lacks its parts")
    return _inflate(rest[2], target) if is_compressed else rest[2]


def _inflate(data: bytes, target: Path) -> bytes:
    try:
        inflater = zlib.decompressobj()
        found = inflater.decompress(data, MAX_BYTES + 1)
    except zlib.error as error:
        raise _malformed(target, f"its metadata cannot be unpacked: {error}") from error
    if len(found) > MAX_BYTES:
        raise BadRequest(f"{target}: its metadata unpack to more than {MAX_BYTES} bytes")
    return found


def _in_jpeg(file: BinaryIO, target: Path) -> bytes | None:
    file.seek(2)
    for _ in range(_MAX_PARTS):
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xDA, 0xD9):  # the pixels begin, or the file ends
            return None
        length = int.from_bytes(head[2:], "big") - 2
        if length < 0:
            raise _malformed(target, "a segment has no length")
        after = file.tell() + length
        if head[1] == 0xE1:
            data = _read(file, length, target)
            if data.startswith(b"Exif\0\0") and (found := _user_comment(data, target)) is not None:
                return found
        file.seek(after)
    raise _malformed(target, f"more than {_MAX_PARTS} segments")


def _in_webp(file: BinaryIO, target: Path) -> bytes | None:
    file.seek(12)
    for _ in range(_MAX_PARTS):
        head = file.read(8)
        if len(head) < 8:
            return None
        length = int.from_bytes(head[4:], "little")
        after = file.tell() + length + length % 2
        if head[:4] == b"EXIF":
            data = _read(file, length, target)
            return _user_comment(data if data.startswith(b"Exif\0\0") else b"Exif\0\0" + data, target)
        file.seek(after)
    raise _malformed(target, f"more than {_MAX_PARTS} chunks")


def _user_comment(data: bytes, target: Path) -> bytes | None:
    """Return the comment in an EXIF block, if it is a JSON object in ASCII."""
    from PIL import Image

    found = Image.Exif()
    try:
        found.load(data)
        comment = found.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except Exception as error:
        raise _malformed(target, f"EXIF: {error!s:.100}") from error
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII + b"{"):
        return None
    return comment[len(_ASCII) :]


def _in_mp4(file: BinaryIO, target: Path) -> bytes | None:
    end = os.fstat(file.fileno()).st_size
    start = 0
    for name in (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"):
        found = next((each for each in _boxes(file, start, end, target) if each[0] == name), None)
        if found is None:
            return None
        _, start, end = found
        if name == b"meta":
            start += 4  # its version and flags
    if end - start < 8:
        raise _malformed(target, "a comment lacks its head")
    file.seek(start + 8)  # the type of its data, and a language
    text = _read(file, end - start - 8, target)
    return text if text.startswith(b"{") else None


def _boxes(file: BinaryIO, start: int, end: int, target: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of the content of each box between two places."""
    for _ in range(_MAX_PARTS):
        if start + 8 > end:
            return
        file.seek(start)
        head = file.read(16)
        size, begins = int.from_bytes(head[:4], "big"), start + 8
        if size == 1:
            size, begins = int.from_bytes(head[8:16], "big"), start + 16
        elif size == 0:
            size = end - start
        if begins > start + size or start + size > end:
            raise _malformed(target, f"a box at byte {start} is larger than what it lies in, or has no size")
        yield head[4:8], begins, start + size
        start += size
    raise _malformed(target, f"more than {_MAX_PARTS} boxes")
