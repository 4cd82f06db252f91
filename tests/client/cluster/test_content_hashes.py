"""Content hashes: of all bytes, computed once, and never those of a file as it was before."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from xditd.client.cluster import content_hashes
from xditd.client.cluster.content_hashes import ContentHashes, check_content_id
from xditd.client.cluster.files import HostFiles
from xditd.ipc.errors import BadRequest, StaleSource, UnknownComponent


@pytest.fixture
def hashes(tmp_path: Path) -> ContentHashes:
    return ContentHashes(tmp_path / "cache" / "hashes.json")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read from now on."""
    found: list[Path] = []
    whole = content_hashes._hash
    monkeypatch.setattr(content_hashes, "_hash", lambda path, key: (found.append(path), whole(path, key))[1])
    return found


def test_it_is_blake2b_of_all_bytes(hashes: ContentHashes, tmp_path: Path) -> None:
    file = tmp_path / "a"
    data = os.urandom(3 << 21) + b"end"
    file.write_bytes(data)
    assert hashes.of(file) == "blake2b:" + hashlib.blake2b(data, digest_size=32).hexdigest()


def test_a_file_is_read_once_also_by_the_next_process(hashes: ContentHashes, tmp_path: Path, reads: list[Path]) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"1")
    first = hashes.of(file)
    assert ContentHashes(tmp_path / "cache" / "hashes.json").of(file) == first == hashes.of(file)
    assert reads == [file]
    assert (tmp_path / "cache" / "hashes.json").stat().st_mode & 0o077 == 0


def test_a_change_with_the_same_size_and_an_mtime_set_back_is_seen(hashes: ContentHashes, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"1")
    before = file.stat()
    first = hashes.of(file)
    file.write_bytes(b"2")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes.of(file) != first


def test_a_file_that_changes_while_it_is_read_has_no_hash(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"1")
    key = content_hashes.file_key(file)
    file.write_bytes(b"22")
    with pytest.raises(StaleSource, match="changed while"):
        content_hashes._hash(file, key)


def test_a_cache_that_others_may_write_is_not_used(tmp_path: Path, reads: list[Path]) -> None:
    file, cache = tmp_path / "a", tmp_path / "hashes.json"
    file.write_bytes(b"1")
    ContentHashes(cache).of(file)
    cache.chmod(0o666)
    ContentHashes(cache).of(file)
    assert reads == [file, file]


@pytest.mark.parametrize("text", ["", "[[1,", "{}", "\xff", "[[1, 2, 3, 4, 5]]", "KEY_WITHOUT_HASH"])
def test_a_broken_cache_is_not_used_and_is_replaced(tmp_path: Path, text: str) -> None:
    file, cache = tmp_path / "a", tmp_path / "hashes.json"
    file.write_bytes(b"1")
    key = ", ".join(map(str, content_hashes.file_key(file)))
    cache.write_text(text.replace("KEY_WITHOUT_HASH", f'[[{key}, "the hash of another file"]]'), encoding="latin-1")
    cache.chmod(0o600)
    found = ContentHashes(cache).of(file)
    assert found == "blake2b:" + hashlib.blake2b(b"1", digest_size=32).hexdigest()
    assert found in cache.read_text()


def test_hashes_that_another_process_has_found_stay_in_the_cache(tmp_path: Path, reads: list[Path]) -> None:
    files, cache = [tmp_path / name for name in "ab"], tmp_path / "hashes.json"
    both = [ContentHashes(cache), ContentHashes(cache)]
    for hashes, file in zip(both, files, strict=True):
        file.write_bytes(file.name.encode())
        hashes.of(file)
    for file in files:
        ContentHashes(cache).of(file)
    assert reads == files


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_cache_without_room_costs_the_cache_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def fill(*_: object, **__: object) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"1")

    monkeypatch.setattr(content_hashes, "write_file", fill)
    file = tmp_path / "a"
    file.write_bytes(b"1")
    assert ContentHashes(tmp_path / "hashes.json").of(file).startswith("blake2b:")
    assert "No space left on device" in caplog.text


def test_folders_and_fifos_are_refused(hashes: ContentHashes, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(BadRequest, match="not a regular file"):
            hashes.of(path)


@pytest.mark.parametrize("text", ["", "blake2b:12", "sha256:" + "0" * 64, "blake2b:" + "G" * 64, "/models/a"])
def test_other_texts_are_no_content_hash(text: str) -> None:
    with pytest.raises(BadRequest, match="no content hash"):
        check_content_id(text)


def test_files_are_found_by_content_at_any_path(hashes: ContentHashes, tmp_path: Path) -> None:
    deep = tmp_path / "models" / "flux"
    deep.mkdir(parents=True)
    (deep / "a.safetensors").write_bytes(b"one")
    (deep / "b.gguf").write_bytes(b"two")
    (deep / "notes.txt").write_bytes(b"three")
    files = HostFiles([tmp_path / "models"], hashes)
    files.scan()
    one = hashes.of(deep / "a.safetensors")
    assert files.digests() == {one: 3, hashes.of(deep / "b.gguf"): 3}
    (deep / "a.safetensors").rename(deep / "moved.safetensors")
    path, key = files.find(one)
    assert path == deep / "moved.safetensors"
    path.write_bytes(b"other")
    with pytest.raises(StaleSource, match="changed since"):
        files.check(path, key)
    with pytest.raises(UnknownComponent, match="no file below"):
        files.find(one)


def test_a_disk_that_is_not_mounted_yet_has_files_once_it_is(hashes: ContentHashes, tmp_path: Path) -> None:
    files = HostFiles([tmp_path / "disk"], hashes)
    files.scan()
    assert files.digests() == {}
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.safetensors").write_bytes(b"one")
    files.scan()
    assert list(files.digests().values()) == [3]


def test_a_file_that_cannot_be_hashed_is_told_once(
    hashes: ContentHashes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    files = HostFiles([tmp_path], hashes)
    for _ in range(3):
        files.scan()
    assert caplog.text.count("file is not offered") == 1
