"""A file that is written over after a loader has read it is noticed; one that is only renamed or linked is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xditd.client import StaleSource
from xditd.client.comfyui.source_files import SourceFiles, while_unchanged
from xditd.client.comfyui.weights import RemoteWeights
from xditd.ipc.tensors import ComponentKind
from xditd.ipc.transports.file import LentFile


@pytest.fixture
def path(tmp_path) -> Path:
    save_file({"a": torch.zeros(4096)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def opened(path: Path) -> LentFile:
    file = LentFile(str(path))
    file.close()
    return file


def write_over(path: Path) -> None:
    save_file({"a": torch.ones(4096)}, path.with_name("new"))
    path.write_bytes(path.with_name("new").read_bytes())
    os.utime(path, ns=(0, 0))  # later than the first write, whatever the clock of the file system


def test_mapped_tensors_of_a_file_that_was_written_over(path):
    tensors = load_file(path)
    files = SourceFiles.behind([*tensors.values(), torch.zeros(3), torch.zeros(0), torch.zeros(3, device="meta")])
    files.check()
    write_over(path)
    with pytest.raises(StaleSource, match=r"x\.safetensors: changed since a loader read it \(mtime.*Execution Cache"):
        files.check()


def test_mapped_tensors_of_a_file_whose_name_has_gone_or_is_that_of_another(path):
    tensors = load_file(path)
    files = SourceFiles.behind(tensors.values())
    os.link(path, path.with_name("linked"))
    files.check()
    shutil.copy(path, path.with_name("other"))
    os.replace(path.with_name("other"), path)
    files.check()
    path.unlink()
    files.check()
    assert torch.equal(tensors["a"], torch.zeros(4096))


def test_a_file_that_is_opened_by_its_path_must_be_the_same(path):
    files = SourceFiles.of(opened(path))
    files.check()
    shutil.copy(path, path.with_name("other"))
    os.replace(path.with_name("other"), path)
    with pytest.raises(StaleSource, match="inode"):
        files.check()


def test_a_file_that_is_written_over_once_it_is_opened(path):
    lent = opened(path)
    write_over(path)
    with pytest.raises(StaleSource, match="mtime"):
        SourceFiles.of(lent).check()


def test_a_file_that_is_written_over_while_it_is_read(path):
    with while_unchanged(str(path)):
        os.link(path, path.with_name("linked"))
    with (
        pytest.raises(StaleSource, match=r"x\.safetensors: changed while a loader read it \(mtime"),
        while_unchanged(str(path)),
    ):
        write_over(path)


@pytest.mark.parametrize("is_whole", [False, True])
def test_weights_of_a_file_that_was_written_over_are_not_lent(is_whole, path):
    weights = RemoteWeights(
        load_file(path),
        kind=ComponentKind.TRANSFORMER,
        label="x",
        device="cpu",
        is_whole=is_whole,
        connect=lambda: pytest.fail("was lent"),
    )
    write_over(path)
    with pytest.raises(StaleSource):
        weights.apply({})
    with pytest.raises(StaleSource):  # as a node does that uses a stock VAE, or a job after a restart of the daemon
        _ = weights.loan
