"""Small safetensors files, compared with the safetensors library."""

import os

import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from xditd.client import tensor_files  # noqa: E402
from xditd.client.tensor_files import read_tensors, write_tensors  # noqa: E402
from xditd.ipc.errors import BadCheckpoint, BadRequest, StaleSource  # noqa: E402

TENSORS = {
    "a": torch.randn(2, 3),
    "b": torch.randn(4).to(torch.bfloat16),
    "c": torch.randn(0, 2, dtype=torch.float64),
    "d": torch.tensor(1.5, dtype=torch.float16),
}


def are_equal(found, expected):
    assert list(found) == list(expected)
    return all(torch.equal(found[name], expected[name]) and found[name].dtype is expected[name].dtype for name in found)


def test_the_library_reads_what_is_written(tmp_path):
    write_tensors(tmp_path / "new" / "t.safetensors", TENSORS)
    found = safetensors_torch.load_file(tmp_path / "new" / "t.safetensors")
    assert are_equal({name: found[name] for name in TENSORS}, TENSORS)


def test_what_the_library_writes_is_read(tmp_path):
    safetensors_torch.save_file(TENSORS, tmp_path / "t.safetensors")
    found = read_tensors(tmp_path / "t.safetensors")
    assert are_equal({name: found[name] for name in TENSORS}, TENSORS)


def test_a_file_that_is_overwritten_while_it_is_read_is_no_mixture(tmp_path, monkeypatch):
    """Its mtime is set back, and its size is the same."""
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    read_into = tensor_files.read_into

    def read_and_overwrite(*given):
        read_into(*given)
        old = path.stat()
        write_tensors(path, {name: tensor + 1 for name, tensor in TENSORS.items()})
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))

    monkeypatch.setattr(tensor_files, "read_into", read_and_overwrite)
    with pytest.raises(StaleSource, match="changed while it was being read"):
        read_tensors(path)


def test_a_transposed_tensor_is_written_in_logical_order(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_tensors(tmp_path / "t.safetensors", {"t": tensor})
    assert torch.equal(read_tensors(tmp_path / "t.safetensors")["t"], tensor)


def test_an_unsupported_dtype_is_named(tmp_path):
    with pytest.raises(BadRequest, match="ids: dtype int64 is not supported"):
        write_tensors(tmp_path / "t.safetensors", {"ids": torch.zeros(1, dtype=torch.int64)})


def test_a_truncated_file_is_refused(tmp_path):
    write_tensors(tmp_path / "t.safetensors", TENSORS)
    whole = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(whole[:-3])
    with pytest.raises(BadCheckpoint, match="truncated"):
        read_tensors(tmp_path / "t.safetensors")
