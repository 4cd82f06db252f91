"""Output files: checked before the job, written atomically, and saved elsewhere if that fails."""

import os
import resource
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xditd.client.output_files import (
    check_folder,
    check_target,
    drop_empty,
    names_folder,
    take_numbered,
    write_file,
    write_or_keep,
)
from xditd.ipc.errors import BadRequest, OutputFailed


@pytest.fixture
def no_large_files():
    """Limit files to 64 KiB, like a full disk or a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_check_changes_nothing(tmp_path):
    assert check_target(tmp_path / "new" / "out.png", 1000) == tmp_path / "new" / "out.png"
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    for path, error, says in (
        (tmp_path, BadRequest, "is a folder"),
        (tmp_path / "fifo", BadRequest, "no regular file"),
        ("/dev/full", BadRequest, "no regular file"),
        (tmp_path / "file" / "out.png", OutputFailed, "Not a directory"),
        (tmp_path / ("x" * 300), OutputFailed, "File name too long"),
        ("/sys/out.png", OutputFailed, "choose another place"),
        ("a\0b", OutputFailed, "null byte"),
    ):
        with pytest.raises(error, match=says):
            check_target(path)
        if error is OutputFailed:
            with pytest.raises(error, match=says):
                write_file(path, b"x")


def test_a_place_without_room_is_refused_before_the_work(tmp_path, no_large_files):
    check_target(tmp_path / "out.png", 60_000)
    for check in (check_target, check_folder):
        with pytest.raises(OutputFailed, match="File too large"):
            check(tmp_path / "out", 1_000_000)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_a_failed_write_leaves_the_old_file(tmp_path, no_large_files):
    path = write_file(tmp_path / "new" / "out.bin", b"old ", b"content")
    with pytest.raises(OutputFailed, match=r"out\.bin: File too large"):
        write_file(path, bytes(100_000))
    assert path.read_bytes() == b"old content"
    assert list(path.parent.iterdir()) == [path]


def test_links_and_modes_stay(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_file(tmp_path / "link.txt", b"new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real.txt").stat().st_mode) == 0o640


def test_a_name_of_maximal_length_is_written(tmp_path):
    assert write_file(tmp_path / ("x" * 255), b"1").read_bytes() == b"1"


def test_a_file_that_cannot_be_written_is_saved_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(OutputFailed, match=r"Not a directory.*the image was saved as") as caught:
        write_or_keep(tmp_path / "file" / "out.png", "image", b"pixels")
    (kept,) = map(Path, caught.value.kept)
    assert kept.parent == tmp_path
    assert kept.suffix == ".png"
    assert kept.read_bytes() == b"pixels"
    assert str(kept) in caught.value.detail
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_an_error_if_no_folder_has_room(tmp_path, no_large_files, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(OutputFailed, match="no other folder has room either; the image is lost") as caught:
        write_or_keep(tmp_path / "out.png", "image", bytes(100_000))
    assert caught.value.kept == ()
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_target("~/a/b.txt") == tmp_path / "a" / "b.txt"
    assert write_file("~/a/b.txt", b"1") == tmp_path / "a" / "b.txt"
    assert check_folder("~/c") == tmp_path / "c"


def test_a_folder_is_named_by_a_slash_or_is_there(tmp_path):
    assert names_folder("cats/")
    assert names_folder(tmp_path)
    assert not names_folder("")  # which names no file, and not the current folder
    assert not names_folder("a" * 300)


def test_numbers_are_taken_once(tmp_path):
    folder = tmp_path / "cats"
    with ThreadPoolExecutor(8) as threads:
        taken = [path for each in threads.map(lambda _: take_numbered(folder, 4, ".png"), range(8)) for path in each]
    assert sorted(path.name for path in taken) == [f"{number:05}.png" for number in range(32)]
    (folder / "00003.png").write_bytes(b"cat")
    (film,) = take_numbered(folder, 1, "")
    assert film.is_dir()
    drop_empty([*taken, film])
    assert [path.name for path in folder.iterdir()] == ["00003.png"]
    with pytest.raises(OutputFailed, match=r"output folder .*00003\.png: "):
        take_numbered(folder / "00003.png", 1, ".png")
