"""Files and folders that cannot be lent are described with the remedy, in the client and by the header reader."""

from __future__ import annotations

import bz2
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from xditd.ipc.errors import BadCheckpoint
from xditd.ipc.file_kinds import folder_kind, kind_of, kind_of_file, shard_of
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.safetensors_header import read_header

INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "weights.safetensors")


WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flux1-dev-Q8_0.gguf": (lambda p: p.write_bytes(b"GGUF\x03\0\0\0" + b"\1" * 99), "a GGUF file"),
    "model.ckpt": (zipped, "a pickle in a zip archive"),
    "pytorch_model.bin": (zipped, "a pickle in a zip archive"),
    "old.pt": (lambda p: p.write_bytes(b"\x80\x02}q\x00X\n\x00\x00\x00state_dictq\x01}q\x02s."), "a pickle"),
    "oldest.pth": (lambda p: p.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), "a pickle"),
    "model.safetensors.index.json": (lambda p: p.write_text(json.dumps(INDEX, indent=2)), "index of a checkpoint"),
    "config.json": (lambda p: p.write_text('{"_class_name": "FluxTransformer2DModel"}'), "a JSON file"),
    "page.safetensors": (lambda p: p.write_text("\n<!DOCTYPE html><html><head>Sign in</head></html>"), "a web page"),
    "page2.safetensors": (lambda p: p.write_text("<html><body>404</body></html>"), "a web page"),
    "pointer.safetensors": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802932552\n"),
        "a Git LFS pointer",
    ),
    "empty.safetensors": (lambda p: p.touch(), "an empty file"),
    "unfinished.safetensors": (lambda p: p.write_bytes(bytes(9_000)), "begins with zeros"),
    "array.npy": (lambda p: p.write_bytes(b"\x93NUMPY\1\0v\0{'descr': '<f4'}"), "a NumPy array"),
    "tf_model.h5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "missing.safetensors": (lambda p: p.write_text("Entry not found"), "a text file that begins 'Entry not found'"),
    "gated.safetensors": (
        lambda p: p.write_text("Access to model a/b is restricted. You must be authenticated to access it.\n" * 99),
        "a text file that begins 'Access to model a/b is restricted. You must",
    ),
    "letters.safetensors": (lambda p: p.write_text("\u00e4" * 2_047 + "a" + "\u00e4" * 99), "a text file"),
    "weights.tar": (tarred, "a tar archive"),
    "weights.xz": (lambda p: p.write_bytes(lzma.compress(b"1" * 99)), "an xz archive"),
    "weights.bz2": (lambda p: p.write_bytes(bz2.compress(b"1" * 99)), "a bzip2 archive"),
    "weights.zst": (lambda p: p.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99)), "a zstd archive"),
    "weights.rar": (lambda p: p.write_bytes(b"Rar!\x1a\x07\x01\x00" + bytes(99)), "a RAR archive"),
    "picture.webp": (lambda p: p.write_bytes(b"RIFF\x00\x10\x00\x00WEBPVP8 " + bytes(99)), "a picture"),
    "weights.gz": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "a gzip archive"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_named_by_its_first_bytes_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    write, expected = WRITERS[name]
    for path in (tmp_path / name, tmp_path / "renamed.safetensors"):
        write(path)
        lent = LentFile(str(path))
        try:
            with pytest.raises(BadCheckpoint) as caught:
                read_header(lent.fd, lent.path)
        finally:
            lent.close()
        assert expected in caught.value.detail
        assert len(caught.value.detail) - len(str(path)) < 250
        assert "header" not in caught.value.detail
        found = kind_of_file(str(path))
        assert found is not None
        assert expected in found


@pytest.mark.parametrize("length", [2, 0x280, 0x0380, 0x8B1F, 30 * 2**20])
def test_no_sound_start_is_taken_for_another_format(length: int) -> None:
    """The length of a header can have the same bytes as the start of a pickle or gzip file."""
    assert kind_of(length.to_bytes(8, "little") + b'{"a":', 8 + length) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("diffusion_pytorch_model-00001-of-00003.safetensors", "file 1 of the 3"),
        ("/x/model-00002-of-00002.safetensors", "file 2 of the 2"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "file 1 of the 2"),
        (
            "flux1-dev-Q8_0-00001-of-00002.gguf",
            "file 1 of the 2 that make this checkpoint: merge them (llama-gguf-split",
        ),
        ("model-00001-of-00001.safetensors", None),
        ("model.safetensors", None),
        ("a-00001-of-00002/model.safetensors", None),
    ],
)
def test_one_of_several_files_is_told_by_its_name(name: str, says: str | None) -> None:
    found = shard_of(name)
    assert (found is None) if says is None else (found is not None and says in found)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["model_index.json", "flux1-dev.safetensors", "ae.safetensors"], "pipeline, and it is not known which of its"),
        (["model_index.json"], "a folder of a diffusers pipeline without safetensors or GGUF files"),
        (["model_index.json", "vae/config.json", "transformer/config.json", "scheduler/scheduler_config.json"],
         "a folder of a diffusers pipeline: lend the folders of its components one at a time: transformer, vae"),
        (["config.json", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"], "a checkpoint in 2 files"),
        (["m-00001-of-00002.safetensors", "m.safetensors.index.json"], "lend its index: m.safetensors.index.json"),
        (["config.json", "other.safetensors"], "a folder of a model, and it is not known which of its files to lend: "),
        (["flux1-dev-Q4_K_M.gguf", "README.md"], "which of its files to lend: lend one of them: flux1-dev-Q4_K_M.gguf"),
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "with a GGUF checkpoint in 2 files: merge them"),
        (["config.json", "pytorch_model.bin"], "it has pytorch_model.bin: convert it to safetensors"),
        ([], "a folder without a config.json and without safetensors or GGUF files"),
        ([f"{number}.safetensors" for number in range(9)], "4.safetensors and 4 more"),
    ],
)  # fmt: skip
def test_a_folder_is_named_with_what_can_be_lent_of_it(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert says in folder_kind(str(tmp_path))
    with pytest.raises(BadCheckpoint, match="this is a folder"):
        LentFile(str(tmp_path))


def test_what_cannot_be_opened_is_not_named(tmp_path: Path) -> None:
    assert kind_of_file(str(tmp_path / "missing")) is None
