"""Lent memory that is not what was described, or stops being it: refused by name, and never a wrong image."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct

import msgspec
import pytest
import torch
from packed_checkpoints import pack
from safetensors.torch import load_file, save_file

from xditd.client import (
    BadCheckpoint,
    BadRequest,
    Client,
    LeaseLost,
    OutOfMemory,
    StaleSource,
    UnknownComponent,
    WorkersLost,
)
from xditd.client.lending import describe
from xditd.ipc.replies import Lent, Returned
from xditd.ipc.requests import Lend, ReturnLoan
from xditd.ipc.tensors import Manifest


class RawLender:
    """Sends manifests that no library has looked at."""

    def __init__(self, client: Client) -> None:
        self._connection = client._current().connection

    def lend(self, manifest: Manifest) -> Lent:
        request = Lend(request_id=self._connection.next_request_id(), manifest=manifest)
        return self._connection.ask(request, Lent, deadline_s=30)

    def take_back(self, lent: Lent) -> None:
        request = ReturnLoan(request_id=self._connection.next_request_id(), component_id=lent.component_id)
        self._connection.ask(request, Returned)


@pytest.fixture
def raw(client):
    return RawLender(client)


def offer(path):
    return describe(path, kind=None, label=None, device=None, generation=0)


def test_a_stale_descriptor(raw, files):
    offered = offer(files.tuned)
    offered.close()
    with pytest.raises(StaleSource):
        raw.lend(offered.manifest)


def test_a_manifest_replayed_by_another_process(raw, files, start_script):
    """Its descriptors mean something else here: a message cannot name another process."""
    child = start_script(
        """
        import sys, msgspec
        from xditd.client.lending import describe
        offer = describe(sys.argv[1], kind=None, label=None, device=None, generation=0)
        print(msgspec.json.encode(offer.manifest).decode(), flush=True)
        sys.stdin.read()
        """,
        files.tuned,
    )
    manifest = msgspec.json.decode(child.stdout.readline(), type=Manifest)
    with pytest.raises(StaleSource):
        raw.lend(manifest)


def test_packed_weights_that_are_larger_than_any_memory_once_dequantised(raw, files, tmp_path):
    """All elements are one byte: the workers refuse together, and keep what else is lent."""
    packed = pack(load_file(files.transformer), "plain", torch.float32)
    with contextlib.closing(offer(packed.save(tmp_path / "x.safetensors"))) as offered:
        manifest = offered.manifest
        name = "txt_in.weight"
        shape = next(each.shape[0] for each in manifest.tensors if each.name == name), 2**33
        wide = [
            msgspec.structs.replace(each, shape=shape, stride=(0, 0)) if each.name == name else each
            for each in manifest.tensors
        ]
        packed_wide = [
            msgspec.structs.replace(each, shape=shape) if each.weight == name else each for each in manifest.packed
        ]
        with pytest.raises(OutOfMemory, match="no room on the worker's device") as caught:
            raw.lend(msgspec.structs.replace(manifest, tensors=tuple(wide), packed=tuple(packed_wide)))
    assert "rebuilt" not in caught.value.detail


def test_an_older_generation(raw, files):
    with contextlib.closing(offer(files.tuned)) as offered:
        lent = raw.lend(msgspec.structs.replace(offered.manifest, generation=3))
        with pytest.raises(StaleSource, match="generation 2 was offered"):
            raw.lend(msgspec.structs.replace(offered.manifest, generation=2))
        raw.take_back(lent)


def test_a_loan_whose_owner_died_while_it_waited(
    daemon, client, transformer, files, make_inputs, start_script, wait_until
):
    """The exporter's pid is dead by the time that the workers would open its memory."""
    child = start_script(
        """
        import sys
        from xditd.client import Client
        client = Client(sys.argv[1])
        with client.lend(sys.argv[2]):
            pass
        print("now", flush=True)
        sys.stdin.readline()
        client.lend(sys.argv[2])
        """,
        daemon.runtime_dir,
        files.tuned,
    )
    assert child.stdout.readline() == "now\n"
    inputs = make_inputs()
    job = client.generate(transformer, inputs.conditioning, height=128, width=128, steps=1000, seed=1)
    next(events := iter(job))
    child.stdin.write("lend\n")
    child.stdin.flush()
    wait_until(lambda: [waiting.op for waiting in client.status().jobs] == ["generate", "lend"], "the lend to wait")
    child.kill()
    child.wait()
    wait_until(lambda: len(client.status().jobs) == 1, "the lend of a dead process to end")
    events.close()
    assert len(client.status().components) == 1


@pytest.mark.parametrize("path", ["../../../../etc/shadow", "/etc/shadow", "\0", "/proc/self/mem"])
def test_a_path_is_for_people_and_nothing_else(path, raw, files):
    """Workers open the descriptor that the kernel says is the client's, whatever the path claims."""
    offered = offer(files.tuned)
    (block,) = offered.manifest.blocks
    with open("/etc/passwd", "rb") as other, contextlib.closing(offered):
        elsewhere = msgspec.structs.replace(block, path=path, fd=other.fileno())
        with pytest.raises(StaleSource):
            raw.lend(msgspec.structs.replace(offered.manifest, blocks=(elsewhere,)))
        named = msgspec.structs.replace(block, path=path)
        lent = raw.lend(msgspec.structs.replace(offered.manifest, blocks=(named,)))
        raw.take_back(lent)


def test_things_that_are_no_files(client, tmp_path):
    fifo, folder = tmp_path / "fifo.safetensors", tmp_path / "folder"
    os.mkfifo(fifo)
    folder.mkdir()
    for path in (fifo, folder, "/dev/zero", "/proc/self/maps"):
        with pytest.raises(BadCheckpoint):
            client.lend(path)


def test_a_link_that_leads_nowhere(client, tmp_path):
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to(tmp_path / "nothing")
    with pytest.raises(BadRequest, match="no such file or folder"):
        client.lend(dangling)


def test_a_link_that_is_turned_elsewhere(client, files, tmp_path, good_job):
    """What was lent is the file that the link named then."""
    link = tmp_path / "link.safetensors"
    link.symlink_to(files.transformer)
    with client.lend(link) as loan:
        link.unlink()
        link.symlink_to("/etc/passwd")
        good_job(client, loan)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 100 * 2**20) + b"{}",
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("a", 0), ("b", 4))},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {"../../etc/passwd": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**60]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [-8, 0]}},
    ],
    ids=["giant", "longer than the file", "overlapping", "beyond memory", "beyond the file", "negative"],
)  # fmt: skip
def test_headers_that_lie(header, client, tmp_path):
    path = tmp_path / "lies.safetensors"
    if isinstance(header, dict):
        text = json.dumps(header).encode()
        header = struct.pack("<Q", len(text)) + text + bytes(12)
    path.write_bytes(header)
    with pytest.raises(BadCheckpoint, match=r"lies\.safetensors"):
        client.lend(path)


@pytest.fixture
def copied(files, tmp_path):
    path = tmp_path / "copy.safetensors"
    shutil.copyfile(files.transformer, path)
    return path


def test_a_file_that_is_replaced(client, files, copied, good_job):
    """Another file under its name changes nothing: the loan is of the file, not of the name."""
    with client.lend(copied) as loan:
        os.replace(shutil.copyfile(files.tuned, copied.with_name("new")), copied)
        good_job(client, loan)


@pytest.mark.parametrize("change", ["rewritten", "grown", "truncated"])
def test_a_file_that_changes_between_jobs(change, client, copied, make_inputs, run, good_job):
    with client.lend(copied) as loan:
        good_job(client, loan)
        with copied.open("r+b") as file:
            if change == "rewritten":
                file.seek(-4096, os.SEEK_END)
                file.write(bytes(4096))
            elif change == "grown":
                file.seek(0, os.SEEK_END)
                file.write(b"more")
            else:
                file.truncate(4096)
        with pytest.raises(StaleSource, match=r"copy\.safetensors.*changed"):
            run(client, loan, make_inputs(seed=5))
    good_job()


def overwrite(path, other):
    """Put another file's bytes into this one and set its mtime back, as sync and restore tools do."""
    old = path.stat()
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) == (
        old.st_size,
        old.st_mtime_ns,
        old.st_ino,
    )


@pytest.mark.parametrize("is_used_before", [True, False])
def test_a_file_that_is_overwritten_with_its_old_mtime(
    is_used_before, client, files, copied, make_inputs, run, good_job
):
    """Another model's bytes, of the same size: neither its image nor a mixture."""
    with client.lend(copied) as loan:
        if is_used_before:
            good_job(client, loan)
        overwrite(copied, files.tuned)
        for _ in range(2):
            with pytest.raises(StaleSource, match=r"copy\.safetensors.*changed.*ctime"):
                run(client, loan, make_inputs(seed=5))
        with pytest.raises(StaleSource, match=r"copy\.safetensors.*changed.*ctime"):
            loan.adopt()
        # The same path again is no loan of the same bytes.
        with client.lend(copied) as again, client.lend(files.tuned) as tuned:
            assert not again.is_reused
            inputs = make_inputs(seed=5)
            assert torch.equal(run(client, again, inputs), run(client, tuned, inputs))


def test_a_file_that_is_overwritten_in_mid_job_with_its_old_mtime(client, files, copied, make_inputs):
    inputs = make_inputs()
    with client.lend(copied) as loan:
        job = client.generate(loan, inputs.conditioning, height=128, width=128, steps=20, seed=1)
        next(events := iter(job))
        overwrite(copied, files.tuned)
        with pytest.raises(StaleSource, match=r"copy\.safetensors.*changed.*ctime"):
            job.result()
        events.close()


def test_the_second_shard_of_a_checkpoint_that_is_overwritten_with_its_old_mtime(
    client, files, tmp_path, make_inputs, run, good_job
):
    """Tensors of two mapped files are lent as one component: each of the files is watched."""
    names = sorted(load_file(files.transformer))
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    shards = []
    for source in (files.transformer, files.tuned):
        whole = load_file(source)
        for number, half in enumerate(halves):
            shards.append(tmp_path / f"{source.stem}-{number}.safetensors")
            save_file({name: whole[name] for name in half}, shards[-1])
        del whole
    state = {name: tensor for shard in shards[:2] for name, tensor in load_file(shard).items()}
    with client.lend(state) as loan:
        assert [tier.value for tier in loan.tiers] == ["file"]
        good_job(client, loan)
        overwrite(shards[1], shards[3])
        with pytest.raises(StaleSource, match=r"flux1-1\.safetensors.*changed.*ctime"):
            run(client, loan, make_inputs(seed=5))


def test_a_file_whose_ctime_alone_moves(client, copied, good_job):
    """Another mode, a hard link, another name: the bytes are compared, and are the same."""
    with client.lend(copied) as loan:
        copied.chmod(0o400)
        good_job(client, loan)
        os.link(copied, copied.with_name("link"))
        good_job(client, loan)
        copied.rename(copied.with_name("renamed"))
        good_job(client, loan)


@pytest.mark.long
@pytest.mark.slow
def test_files_that_change_before_a_rebuild(daemon, client, files, copied, make_inputs, run, good_job, wait_until):
    """The rebuilt ranks compare with what was lent, too: by the digests that the daemon was told."""
    other = copied.with_name("other.safetensors")
    shutil.copyfile(files.transformer, other)
    replaced, overwritten = client.lend(copied), client.lend(other)
    good_job(client, replaced)
    good_job(client, overwritten)
    os.replace(shutil.copyfile(files.tuned, copied.with_name("new")), copied)
    overwrite(other, files.tuned)
    ranks = {worker.pid for worker in daemon.status().workers}
    os.kill(min(ranks), signal.SIGKILL)
    wait_until(lambda: ranks.isdisjoint(worker.pid for worker in daemon.wait_ready().workers), "other workers")
    good_job(client, replaced)
    replaced.return_()
    with pytest.raises(LeaseLost, match=r"could not map it.*other\.safetensors.*changed.*ctime and bytes"):
        run(client, overwritten, make_inputs(seed=5))


def test_a_file_that_is_rewritten_in_mid_job(client, copied, make_inputs, good_job):
    inputs = make_inputs()
    with client.lend(copied) as loan:
        job = client.generate(loan, inputs.conditioning, height=128, width=128, steps=20, seed=1)
        next(events := iter(job))
        with copied.open("r+b") as file:
            file.seek(-4096, os.SEEK_END)
            file.write(bytes(4096))
        with pytest.raises(StaleSource, match=r"copy\.safetensors.*changed"):
            job.result()
        events.close()


@pytest.mark.long
@pytest.mark.slow
def test_a_file_that_is_truncated_in_mid_job(client, copied, make_inputs, run, good_job):
    """Reading beyond its end is a SIGBUS for the ranks; the rebuilt ones cannot map it, and its loan ends."""
    inputs = make_inputs()
    loan = client.lend(copied)
    job = client.generate(loan, inputs.conditioning, height=128, width=128, steps=1000, seed=1)
    next(events := iter(job))
    os.truncate(copied, 4096)
    with pytest.raises(WorkersLost):
        job.result()
    events.close()
    good_job()
    with pytest.raises((LeaseLost, UnknownComponent)):
        run(client, loan, inputs)
