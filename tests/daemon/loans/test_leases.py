from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from xditd.daemon.loans.leases import LeaseTable, is_same_content
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.errors import StaleSource, UnknownComponent
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.status import LeaseState
from xditd.ipc.tensors import (
    Block,
    ComponentKind,
    CudaIpcBlock,
    FileBlock,
    FileDigest,
    Fingerprint,
    HostShmBlock,
    Manifest,
    ModuleDescription,
    TensorSpec,
)

OWNER = Session(b"a", "", ProcessIdentity(pid=1, start_ticks=0), -1, "test")
STRANGER = Session(b"b", "", ProcessIdentity(pid=2, start_ticks=0), -1, "test")


def fingerprint(text: bytes = b"x") -> Fingerprint:
    return Fingerprint(length_bytes=1, digest=text * 16)


def shm(inode: int = 1, fd: int = 3, text: bytes = b"x") -> HostShmBlock:
    return HostShmBlock(fd=fd, inode=inode, size_bytes=100, fingerprint=fingerprint(text))


def file(mtime_ns: int = 1, fd: int = 3, ctime_ns: int = 1) -> FileBlock:
    times = {"mtime_ns": mtime_ns, "ctime_ns": ctime_ns}
    return FileBlock(fd=fd, path="/m", device=1, inode=1, size_bytes=100, fingerprint=fingerprint(), **times)


def manifest(
    blocks: Sequence[Block], generation: int = 0, kind: str = "transformer", names: Sequence[str] = ("w",)
) -> Manifest:
    tensors = tuple(TensorSpec(name, "uint8", (4,), 0, 0) for name in names)
    return Manifest(kind=ComponentKind(kind), label="m", blocks=tuple(blocks), tensors=tensors, generation=generation)


def test_same_memory_is_found_for_its_owner_only() -> None:
    table = LeaseTable()
    lease = table.add(OWNER, manifest([shm()]))
    assert table.find_same_memory(OWNER, manifest([shm()])) is lease
    assert table.find_same_memory(OWNER, manifest([shm()], generation=1)) is lease
    assert table.find_same_memory(STRANGER, manifest([shm()])) is None


def test_other_memory_kind_or_tensors_are_another_component() -> None:
    table = LeaseTable()
    table.add(OWNER, manifest([shm()]))
    for other in (
        manifest([shm(inode=2)]),
        manifest([shm()], kind="vae"),
        manifest([shm()], names=["v"]),
        manifest([shm(), shm(inode=2)]),
        manifest([file()]),
    ):
        assert table.find_same_memory(OWNER, other) is None


def test_a_module_that_runs_in_another_way_is_another_component() -> None:
    plain = ModuleDescription(class_name="diffusers.AutoencoderKL", config="{}")
    table = LeaseTable()
    lease = table.add(OWNER, replace(manifest([file()]), module=plain))
    assert table.find_same_memory(OWNER, replace(manifest([file(fd=9)]), module=plain)) is lease
    for other in (
        None,
        replace(plain, config='{"a": 1}'),
        replace(plain, state=b"tiled"),
        replace(plain, allows_family=True),
        replace(plain, acceleration="eager"),
    ):
        assert table.find_same_memory(OWNER, replace(manifest([file()]), module=other)) is None


def test_older_generation_is_refused() -> None:
    table = LeaseTable()
    lease = table.add(OWNER, manifest([shm()], generation=3))
    with pytest.raises(StaleSource, match=f"generation 2 was offered, but {lease.component_id} has generation 3"):
        table.find_same_memory(OWNER, manifest([shm()], generation=2))


def test_content_is_the_same_whatever_descriptor_leads_to_it() -> None:
    assert is_same_content(manifest([shm()]), manifest([shm(fd=9)]))
    assert is_same_content(manifest([file()]), manifest([file(fd=9)]))
    assert not is_same_content(manifest([shm()]), manifest([shm(text=b"y")]))
    assert not is_same_content(manifest([shm()]), manifest([shm()], generation=1))
    assert not is_same_content(manifest([file()]), manifest([file(mtime_ns=2)]))
    assert not is_same_content(manifest([file()]), manifest([file(ctime_ns=2)]))  # even with the mtime set back


def test_digests_are_kept_for_as_long_as_the_files_are_the_same() -> None:
    table = LeaseTable()
    lease = table.add(OWNER, manifest([shm(), file(ctime_ns=5)]))
    found = FileDigest(block=1, ctime_ns=5, digest=b"d" * 16)
    others = (
        FileDigest(block=0, ctime_ns=5, digest=b"d" * 16),  # no file
        FileDigest(block=1, ctime_ns=4, digest=b"d" * 16),  # of what it held before
        FileDigest(block=2, ctime_ns=5, digest=b"d" * 16),  # no such block
    )
    table.note_digests("another", (found,))
    assert lease.digests == ()
    table.note_digests(lease.component_id, (*others, found))
    assert lease.digests == (found,)
    lease.replace_manifest(manifest([shm(), file(ctime_ns=5, fd=9)]))
    assert lease.digests == (found,)
    lease.replace_manifest(manifest([shm(), file(ctime_ns=6)]))
    assert lease.digests == ()


def test_cuda_blocks_are_told_apart_by_gpu_and_handle() -> None:
    def cuda(uuid: str, handle: bytes) -> CudaIpcBlock:
        return CudaIpcBlock(device_uuid=uuid, handle=handle * 64, size_bytes=100, fingerprint=fingerprint())

    table = LeaseTable()
    lease = table.add(OWNER, manifest([cuda("GPU-1", b"h")]))
    assert table.find_same_memory(OWNER, manifest([cuda("GPU-1", b"h")])) is lease
    assert table.find_same_memory(OWNER, manifest([cuda("GPU-2", b"h")])) is None
    assert table.find_same_memory(OWNER, manifest([cuda("GPU-1", b"i")])) is None


def test_ended_leases_are_unknown_and_their_waiters_told() -> None:
    table = LeaseTable()
    lease = table.add(OWNER, manifest([shm()]))
    assert table.live(lease.component_id) is lease
    told: list[str] = []
    lease.on_ended.append(lambda: told.append("ended"))
    lease.move(LeaseState.RETURNING)
    with pytest.raises(UnknownComponent, match=lease.component_id):
        table.live(lease.component_id)
    assert table.find_same_memory(OWNER, manifest([shm()])) is None
    table.end(lease)
    assert told == ["ended"]
    assert list(table) == []


def test_ids_do_not_come_back() -> None:
    ids = {LeaseTable().add(OWNER, manifest([shm()])).component_id for _ in range(20)}
    assert len(ids) == 20
