"""Files lent by descriptor are used only while they are unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from xditd.ipc import codec
from xditd.ipc.errors import BadCheckpoint, Internal, OutOfMemory, ProcessGone, StaleSource
from xditd.ipc.processes import ProcessIdentity, identify
from xditd.ipc.requests import Lend
from xditd.ipc.tensors import ComponentKind, FileBlock, Manifest, TensorSpec
from xditd.ipc.transports import file
from xditd.ipc.transports.file import LentFile, map_file
from xditd.ipc.transports.fingerprints import check_fingerprint


@pytest.fixture
def me() -> ProcessIdentity:
    return identify(os.getpid())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(2000.0)}, path)
    return path


@pytest.fixture
def lent(path: Path) -> Any:
    lent = LentFile(str(path))
    yield lent
    lent.close()


def test_the_block_describes_the_file(lent: LentFile, path: Path) -> None:
    block = lent.block()
    found = path.stat()
    assert (block.device, block.inode, block.size_bytes) == (found.st_dev, found.st_ino, found.st_size)
    assert (block.mtime_ns, block.path) == (found.st_mtime_ns, str(path))
    assert (block.fingerprint.offset_bytes, block.fingerprint.length_bytes) == (0, 4096)
    assert lent.block(10**9).fingerprint.length_bytes == found.st_size


def test_a_mapping_holds_the_files_bytes(lent: LentFile, path: Path, me: ProcessIdentity) -> None:
    block = lent.block()
    mapping = map_file(block, me)
    check_fingerprint(mapping.bytes_tensor(), block.fingerprint, "x")
    assert bytes(mapping.bytes_tensor().tolist()) == path.read_bytes()
    mapping.check_unchanged()
    mapping.close()


def test_another_processs_file(path: Path, spawn_other: Callable[[], Any]) -> None:
    other = spawn_other()
    owner = msgspec.convert(other.identity, ProcessIdentity)
    block = msgspec.convert(other.ask("export_file", path=str(path)), FileBlock)
    mapping = map_file(block, owner)
    other.kill()
    assert mapping.bytes_tensor()[-4:].view(torch.float32).item() == 1999.0
    mapping.check_unchanged()
    mapping.close()
    with pytest.raises(ProcessGone):
        map_file(block, owner)


def test_a_file_that_was_replaced_under_its_name_is_still_the_lent_one(
    lent: LentFile, path: Path, me: ProcessIdentity
) -> None:
    """The descriptor counts, not the name: a download that replaces the file does not change the loan."""
    block = lent.block()
    mapping = map_file(block, me)
    mapping.begin_digest()
    mapping.await_small_digest()
    save_file({"a": torch.zeros(2000)}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # the lent file has lost its last name, and its ctime has moved
    mapping.check_unchanged()
    assert mapping.bytes_tensor()[-4:].view(torch.float32).item() == 1999.0
    digest = mapping.digest
    mapping.close()
    map_file(block, me, digest).close()  # as the ranks of a rebuilt group do


def overwrite(path: Path, old: os.stat_result) -> None:
    """Write as many other bytes in place, and set the mtime back, as sync and restore tools do."""
    damage_in_place(path)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)


@pytest.mark.parametrize("is_digested", [False, True])
def test_a_file_that_was_overwritten_and_its_mtime_set_back(
    lent: LentFile, path: Path, me: ProcessIdentity, is_digested: bool
) -> None:
    block = lent.block()
    mapping = map_file(block, me)
    if is_digested:
        mapping.begin_digest()
        mapping.await_small_digest()
    overwrite(path, path.stat())
    for _ in range(2):
        with pytest.raises(StaleSource, match=r"changed since it was lent \(ctime"):
            mapping.check_unchanged()
    with pytest.raises(StaleSource, match=r"changed since it was lent \(ctime"):
        map_file(block, me, mapping.digest)
    mapping.close()


@pytest.mark.parametrize("change", ["mode", "link", "name", "time of reading", "same bytes"])
def test_a_ctime_that_moves_alone_is_decided_by_the_bytes(
    lent: LentFile, path: Path, me: ProcessIdentity, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = lent.block()
    mapping = map_file(block, me)
    mapping.begin_digest()
    mapping.await_small_digest()
    old = path.stat()
    if change == "mode":
        path.chmod(0o400)
    elif change == "link":
        os.link(path, path.with_suffix(".link"))
    elif change == "name":
        path = path.rename(path.with_suffix(".renamed"))
    elif change == "time of reading":
        os.utime(path, ns=(1, old.st_mtime_ns))
    else:
        content = path.read_bytes()
        path.write_bytes(content)
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_ctime_ns > old.st_ctime_ns
    read: list[int] = []
    digest_file = file.digest_file
    monkeypatch.setattr(file, "digest_file", lambda fd, size: read.append(size) or digest_file(fd, size))
    mapping.check_unchanged()
    mapping.check_unchanged()
    assert read == [block.size_bytes]  # compared once, not at every use
    path.chmod(0o600)
    overwrite(path, path.stat())
    with pytest.raises(StaleSource, match="changed since it was lent"):
        mapping.check_unchanged()
    mapping.close()


def test_a_ctime_that_moves_before_the_bytes_are_known_is_refused(
    lent: LentFile, path: Path, me: ProcessIdentity
) -> None:
    """Nothing tells what the file held when it was lent, not even a digest that is made afterwards."""
    mapping = map_file(lent.block(), me)
    path.chmod(0o400)
    mapping.begin_digest()
    mapping.await_small_digest()
    assert (mapping.digest, mapping.is_digesting) == (None, False)
    with pytest.raises(StaleSource, match="ctime, before its bytes were digested"):
        mapping.check_unchanged()
    mapping.close()


def damage_in_place(path: Path) -> None:
    with path.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\xff\xff\xff\xff")


@pytest.mark.parametrize(
    "damage",
    [
        damage_in_place,
        lambda path: os.truncate(path, 100),
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, path.stat().st_size + 4),
        lambda path: os.utime(path, (0, 0)),
    ],
    ids=["rewritten", "truncated", "emptied", "grown", "touched"],
)
def test_a_file_that_changed_is_refused(
    lent: LentFile, path: Path, me: ProcessIdentity, damage: Callable[[Path], None], open_fds: Callable[[], int]
) -> None:
    block = lent.block()
    mapping = map_file(block, me)
    old = path.stat().st_mtime_ns
    damage(path)
    if path.stat().st_mtime_ns == old and path.stat().st_size == block.size_bytes:
        os.utime(path, ns=(old, old + 1))  # written within one tick of the file system's clock
    with pytest.raises(StaleSource, match="changed since it was lent"):
        mapping.check_unchanged()
    mapping.close()
    before = open_fds()
    with pytest.raises(StaleSource, match="changed since it was lent"):
        map_file(block, me)
    assert open_fds() == before


def test_a_file_that_changed_between_opening_and_describing_is_refused(lent: LentFile, path: Path) -> None:
    """Its header was read from the file as it was before."""
    os.truncate(path, 5000)
    with pytest.raises(StaleSource, match="changed while"):
        lent.block()


def test_a_file_that_was_overwritten_while_it_was_read_is_refused(lent: LentFile, path: Path) -> None:
    overwrite(path, path.stat())
    with pytest.raises(StaleSource, match=r"changed while it was being read \(ctime\)"):
        lent.check_unchanged()


@pytest.mark.parametrize("field", ["device", "inode", "mtime_ns", "ctime_ns", "size_bytes"])
def test_each_part_of_the_identity_counts(lent: LentFile, me: ProcessIdentity, field: str) -> None:
    block = lent.block()
    wrong = msgspec.structs.replace(block, **{field: getattr(block, field) + 1})
    with pytest.raises(StaleSource, match="changed since it was lent"):
        map_file(wrong, me)


def test_descriptors_of_other_things_are_refused(lent: LentFile, me: ProcessIdentity, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        found = os.fstat(fd)
        as_if = msgspec.structs.replace(
            lent.block(),
            fd=fd,
            device=found.st_dev,
            inode=found.st_ino,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
            size_bytes=found.st_size,
        )
        with pytest.raises(StaleSource, match="not a regular file"):
            map_file(as_if, me)
        os.close(fd)


def test_a_closed_file(lent: LentFile, me: ProcessIdentity) -> None:
    block = lent.block()
    lent.close()
    lent.close()
    with pytest.raises(StaleSource):
        map_file(block, me)


def test_an_empty_file_cannot_be_mapped(tmp_path: Path, me: ProcessIdentity, open_fds: Callable[[], int]) -> None:
    (tmp_path / "empty").touch()
    lent = LentFile(str(tmp_path / "empty"))
    before = open_fds()
    with pytest.raises(StaleSource, match="cannot be mapped"):
        map_file(lent.block(), me)
    assert open_fds() == before
    lent.close()


def test_paths_that_are_no_files(tmp_path: Path, open_fds: Callable[[], int]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = open_fds()
    reasons = {
        "": "directory",
        "fifo": "not a regular file",
        "missing": "no such file or folder; name one of this machine",
        "dangling": "no such file or folder",
        "loop": "symbolic links",
        "fifo/x": "Not a directory",
        "n" * 300: "too long",
        "nul\0byte": "null byte",
    }
    for name, reason in reasons.items():
        with pytest.raises(BadCheckpoint, match="this is a folder" if not name else reason):
            LentFile(str(tmp_path) + "/" + name)
    assert open_fds() == before


def test_a_symbolic_link_lends_what_it_points_to(path: Path, tmp_path: Path, me: ProcessIdentity) -> None:
    (tmp_path / "link").symlink_to(path)
    lent = LentFile(str(tmp_path / "link"))
    block = lent.block()
    assert block.inode == path.stat().st_ino
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("/dev/zero")  # changes nothing: the name is not looked up again
    map_file(block, me).close()
    lent.close()


def test_a_path_that_is_no_unicode_can_be_sent(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.safetensors")
    save_file({"a": torch.zeros(1)}, name)
    lent = LentFile(name)
    manifest = Manifest(
        kind=ComponentKind.VAE,
        label="x",
        blocks=(lent.block(),),
        tensors=(TensorSpec("a", "float32", (1,), 0, 0),),
    )
    sent = codec.request_decoder.decode(codec.encode(Lend(request_id="r", manifest=manifest)))
    assert isinstance(sent, Lend)
    assert "caf" in sent.manifest.blocks[0].path  # type: ignore[union-attr]
    lent.close()


def test_a_file_from_before_1970_can_be_sent(path: Path) -> None:
    os.utime(path, (-5, -5))
    lent = LentFile(str(path))
    assert msgspec.convert(msgspec.to_builtins(lent.block()), FileBlock).mtime_ns == -5 * 10**9
    lent.close()


def test_a_view_keeps_the_mapping_and_closing_twice_is_harmless(lent: LentFile, me: ProcessIdentity) -> None:
    mapping = map_file(lent.block(), me)
    view = mapping.bytes_tensor()
    with pytest.raises(Internal, match="still alive"):
        mapping.close()
    mapping.check_unchanged()
    del view
    mapping.close()
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
    mapping.close()
    for fd in fds:
        os.close(fd)


def test_a_hundred_cycles_leave_nothing(path: Path, me: ProcessIdentity, open_fds: Callable[[], int]) -> None:
    before = open_fds()
    for _ in range(100):
        lent = LentFile(str(path))
        mapping = map_file(lent.block(), me)
        assert mapping.bytes_tensor()[8] == ord("{")
        mapping.close()
        lent.close()
    assert open_fds() == before
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_no_descriptor_left(path: Path, lent: LentFile, me: ProcessIdentity, no_free_fd: Callable[[], None]) -> None:
    block = lent.block()
    no_free_fd()
    with pytest.raises(OutOfMemory, match="open files"):
        LentFile(str(path))
    with pytest.raises(OutOfMemory, match="open files"):
        map_file(block, me)
