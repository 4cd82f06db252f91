"""Records in PNG, JPEG, WebP and MP4 files: written, read again, and hostile ones refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from sample_records import WHOLE

from xditd.client.image_files import encode_image
from xditd.client.metadata.reading import read_record
from xditd.client.metadata.record import MAX_BYTES, Record, encode
from xditd.ipc.errors import BadRequest

SMALL = Record(version="1", prompt="猫", width=8, height=8, steps=1, seed=7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cat.png"


def picture() -> Image.Image:
    return Image.new("RGB", (16, 8), (1, 2, 3))


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP"])
def test_each_format_holds_a_record_and_the_same_pixels(format_name: str, path: Path) -> None:
    data = encode_image(picture(), format_name, encode(WHOLE))
    path.write_bytes(data)
    assert read_record(path) == WHOLE
    plain = encode_image(picture(), format_name)
    assert Image.open(io.BytesIO(data)).tobytes() == Image.open(io.BytesIO(plain)).tobytes()
    path.write_bytes(plain)
    with pytest.raises(BadRequest, match=r"cat\.png: has no record"):
        read_record(path)


def test_other_programs_read_it(path: Path) -> None:
    path.write_bytes(encode_image(picture(), "PNG", encode(SMALL)))
    assert Image.open(path).text["xditd"] == encode(SMALL)  # type: ignore[attr-defined]
    path.write_bytes(encode_image(picture(), "JPEG", encode(SMALL)))
    comment = Image.open(path).getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b'ASCII\0\0\0{"xditd":3')


def test_a_video_holds_it_as_its_comment(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    torch = pytest.importorskip("torch")
    from xditd.client.video_files import encode_video, write_video

    path = tmp_path / "cat.mp4"
    video = torch.zeros(3, 3, 16, 16)
    text = encode(WHOLE)
    path.write_bytes(encode_video(path, video, 16, text))
    assert read_record(path) == WHOLE
    with av.open(str(path)) as container:
        assert container.metadata["comment"] == text
    path.write_bytes(encode_video(path, video, 16))
    with pytest.raises(BadRequest, match="has no record"):
        read_record(path)
    write_video(tmp_path / "frames", video, 16, text)
    assert read_record(tmp_path / "frames" / "frame_00002.png") == WHOLE


def test_a_record_that_a_jpeg_cannot_hold_is_refused_with_the_remedy() -> None:
    long = Record(version="1", prompt="猫" * 20_000, width=8, height=8, steps=1)
    with pytest.raises(BadRequest, match=r"a JPEG holds 65000; save it as \.png or \.webp"):
        encode_image(picture(), "JPEG", encode(long))
    assert encode_image(picture(), "WEBP", encode(long))


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "compressed iTXt"])
def test_texts_that_another_program_wrote_anew_are_read(kind: str, path: Path) -> None:
    text = encode(SMALL).replace("猫", "cat")
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "x" * 100)
    if "iTXt" in kind:
        info.add_itxt("xditd", text, zip=kind != "iTXt")
    else:
        info.add_text("xditd", text, zip=kind == "zTXt")
    picture().save(path, pnginfo=info)
    assert read_record(path).prompt == "cat"


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG = b"\x89PNG\r\n\x1a\n"
ITXT = b"xditd\0\0\0\0\0"
BOMB = zlib.compress(b" " * 100_000_000)


def mp4(*boxes: bytes, length: int | None = None) -> bytes:
    """Nest boxes; the last one's content is ``text``."""
    inner = b""
    for name, extra in reversed(list(zip(boxes, (b"",) * len(boxes), strict=True))):
        content = extra + (b"\0\0\0\0" if name == b"meta" else b"") + inner
        inner = struct.pack(">I", len(content) + 8 if length is None else length) + name + content
    return b"\0\0\0\x10ftypisom\0\0\0\0" + inner


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "neither PNG, JPEG, WebP nor MP4"),
        (b"GIF89a" + bytes(20), "neither PNG"),
        (PNG, "has no record"),
        (PNG + chunk(b"iTXt", ITXT + b"{"), "no JSON"),
        (PNG + chunk(b"iTXt", b"xditd"), "lacks its parts"),
        (PNG + chunk(b"tEXt", b"xditd"), "no JSON"),
        (PNG + chunk(b"iTXt", ITXT + b"{}", length=100_000_000), "have 100000000 bytes; at most 1048576"),
        (PNG + chunk(b"iTXt", ITXT, length=500), "ends within its metadata"),
        (PNG + chunk(b"iTXt", b"xditd\0\1\0\0\0" + BOMB), "unpack to more than 1048576 bytes"),
        (PNG + chunk(b"zTXt", b"xditd\0\0" + BOMB), "unpack to more than 1048576 bytes"),
        (PNG + chunk(b"zTXt", b"xditd\0\0nonsense"), "cannot be unpacked"),
        (PNG + chunk(b"IDAT", b"", length=2**32 - 1), "has no record"),
        (PNG + chunk(b"tEXt", b"") * 100_001, "more than 100000 chunks"),
        (b"\xff\xd8\xff\xe1\0\0", "a segment has no length"),
        (b"\xff\xd8\xff\xe1\xff\xffExif\0\0", "ends within its metadata"),
        (b"\xff\xd8\xff\xe1\0\x10Exif\0\0nonsense", "has no record|EXIF"),
        (b"\xff\xd8\xff\xe1\0\x16Exif\0\0MM\0*\xff\xff\xff\xff\0\0\0\0", "has no record|EXIF|ends within"),
        (b"\xff\xd8\xff\xe0\0\2" * 3, "has no record"),
        (b"RIFF\xff\xff\xff\xffWEBPEXIF\xff\xff\xff\xff", "have 4294967295 bytes"),
        (b"RIFF\0\0\0\0WEBPEXIF\4\0\0\0abcd", "has no record|EXIF"),
        (mp4(b"moov"), "has no record"),
        (mp4(b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"), "a comment lacks its head"),
        (mp4(b"moov", length=3), "is larger than what it lies in, or has no size"),
        (mp4(b"moov", length=2**31), "is larger than what it lies in"),
        (b"\0\0\0\1ftyp\0\0\0\0\0\0\0\1", "is larger than what it lies in, or has no size"),
    ],
)
def test_hostile_files_are_refused_at_once(data: bytes, says: str, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(BadRequest, match=says) as error:
        read_record(path)
    assert str(path) in error.value.detail


def test_100_mb_of_another_programs_text_are_passed_over(path: Path) -> None:
    with path.open("wb") as file:
        file.write(PNG + struct.pack(">I", 100_000_000) + b"iTXtworkflow\0")
        file.truncate(8 + 12 + 100_000_000)
        file.seek(0, 2)
        file.write(chunk(b"iTXt", ITXT + encode(SMALL).encode()))
    tracemalloc.start()
    try:
        assert read_record(path) == SMALL
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_BYTES
    finally:
        tracemalloc.stop()


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for name, says in (("gone.png", "No such file"), (".", "Is a directory|not a regular file"), ("a\0b", "null byte")):
        with pytest.raises(BadRequest, match=says):
            read_record(f"{tmp_path}/{name}")
