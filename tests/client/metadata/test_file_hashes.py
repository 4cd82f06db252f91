"""Hashes of files in records."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from xditd.client.metadata import file_hashes
from xditd.client.metadata.record import FileRecord


def test_a_small_file_has_the_hash_that_others_show(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"abc")
    found = file_hashes.describe(path)
    assert found.name == "style.safetensors"
    assert found.bytes == 3
    assert found.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert file_hashes.is_same(found, path) is True


def test_a_large_file_is_known_by_pieces_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "WHOLE_BYTES", 1_000)
    content = bytearray(os.urandom(2_000_000))
    path, other, shorter = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    path.write_bytes(content)
    shorter.write_bytes(content[:-1])
    found = file_hashes.describe(path)
    assert found.sha256 is None
    assert file_hashes.is_same(found, shorter) is False
    for place in (0, -1):  # the first and the last byte are among the pieces
        changed = bytearray(content)
        changed[place] ^= 1
        other.write_bytes(changed)
        assert file_hashes.is_same(found, other) is False


def test_a_file_that_changes_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = file_hashes.describe(path)
    path.write_bytes(b"two")
    assert file_hashes.describe(path).sha256 != first.sha256
    link = tmp_path / "linked.safetensors"
    os.link(path, link)
    assert file_hashes.describe(link).name == "linked.safetensors"


def test_what_is_no_file_has_a_name_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("gone", "pipe", "."):
        found = file_hashes.describe(tmp_path / name)
        assert (found.bytes, found.sample, found.sha256) == (None, None, None)
        assert file_hashes.is_same(found, tmp_path) is None
    assert file_hashes.describe("/").name == "unnamed"
    assert file_hashes.describe("/home/me/a\nb").name == "a_b"
    assert file_hashes.is_same(FileRecord(name="x"), tmp_path) is None


def test_a_file_that_is_written_while_it_is_hashed_has_a_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    sample = file_hashes._sample

    def overtaken(fd: int, size: int) -> str:
        found = sample(fd, size)
        path.write_bytes(b"two")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(file_hashes, "_sample", overtaken)
        assert file_hashes.describe(path) == FileRecord(name="a.safetensors")
    assert file_hashes.describe(path).sha256 == hashlib.sha256(b"two").hexdigest()
