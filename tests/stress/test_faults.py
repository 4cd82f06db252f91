"""Faults are chosen by name, and each says what has to come of it."""

from __future__ import annotations

import os

import folder_faults
import pytest
from clients import change_mode, link_and_unlink, overwrite, rename
from faults import Broken, Pace, all_faults, choose_faults

FOLDER = "/run/user/1000/xditd"


def test_names_are_unique_and_each_says_what_it_expects():
    faults = all_faults()
    assert len({fault.name for fault in faults}) == len(faults)
    assert all(fault.expects for fault in faults)
    assert all((fault.inject is None) is (fault.pace is Pace.BY_CLIENTS) for fault in faults)


def test_choosing_by_name():
    assert choose_faults(None) == all_faults()
    assert [fault.name for fault in choose_faults(["pause", "cancel"])] == ["cancel", "pause"]
    assert "pause" not in {fault.name for fault in choose_faults(None, without=["pause"])}


@pytest.mark.parametrize(("names", "without"), [(["paws"], []), (None, ["paws"])])
def test_an_unknown_name_is_refused(names, without):
    with pytest.raises(ValueError, match="'paws': unknown; choose from cancel, return"):
        choose_faults(names, without)


def test_a_daemon_that_ends_has_to_say_that_its_folder_is_gone():
    good = f"2026-01-01 00:00:00,000 ERROR xditd.daemon: bad_request: runtime folder {FOLDER}: was removed\n"
    folder_faults.check_end(1, good, FOLDER)
    with pytest.raises(Broken, match="no error in its log names"):
        folder_faults.check_end(1, f"INFO xditd.daemon: daemon listening socket={FOLDER}/daemon.sock\n", FOLDER)
    with pytest.raises(Broken, match="signal 11"):
        folder_faults.check_end(-11, good, FOLDER)


def test_a_file_is_overwritten_without_a_trace_in_size_or_mtime(tmp_path):
    lent, other = tmp_path / "lent", tmp_path / "other"
    lent.write_bytes(b"lent bytes")
    other.write_bytes(b"other byte")
    before = lent.stat()
    overwrite(lent, other)
    after = lent.stat()
    assert lent.read_bytes() == b"other byte"
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("touch", [change_mode, link_and_unlink, rename])
def test_touching_an_inode_moves_ctime_alone(touch, tmp_path):
    lent = tmp_path / "lent.safetensors"
    lent.write_bytes(b"lent bytes")
    lent.chmod(0o600)
    os.utime(lent, ns=(1, 1))
    before = lent.stat()
    touch(lent)
    while (after := lent.stat()).st_ctime_ns == before.st_ctime_ns:
        touch(lent)  # the clock of files may move in steps of some milliseconds
    assert lent.read_bytes() == b"lent bytes"
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
