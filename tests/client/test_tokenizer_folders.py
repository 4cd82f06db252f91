"""Folders of tokenizers on the client's side: which files are lent, and what is refused before anything is sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xditd.client.tokenizer_folders import describe_tokenizer
from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint, BadRequest
from xditd.ipc.tensors import ComponentKind, Tier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tokenizer"
    made.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
        (made / name).write_text("{}")
    return made


def test_files_of_the_closed_list_are_lent_as_they_are(folder: Path) -> None:
    for name in ("model.py", "tokenizer.pkl", "README.md", "spiece.model"):
        (folder / name).write_text("x")
    offer = describe_tokenizer(folder)
    manifest = offer.manifest
    assert manifest.kind is ComponentKind.TOKENIZER
    assert manifest.tiers == (Tier.FILE,)
    assert manifest.label == "tokenizer"
    assert {each.name: each.shape for each in manifest.tensors} == {
        "tokenizer.json": (2,), "tokenizer_config.json": (2,), "merges.txt": (2,),
    }  # fmt: skip
    offer.close()


def test_sentencepiece_is_lent_without_a_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"\x0a")
    offer = describe_tokenizer(folder, label="t5")
    assert [each.name for each in offer.manifest.tensors] == ["tokenizer_config.json", "merges.txt", "spiece.model"]
    assert offer.manifest.label == "t5"
    offer.close()


def test_links_are_followed_as_the_hubs_cache_needs_it(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text('{"a": 1}')
    (folder / "vocab.json").symlink_to(blob)
    offer = describe_tokenizer(folder)
    assert {each.name: each.shape for each in offer.manifest.tensors}["vocab.json"] == (8,)
    offer.close()


def test_what_is_no_tokenizer_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, says: str) -> None:
        with pytest.raises(BadCheckpoint, match=says):
            describe_tokenizer(path)

    with pytest.raises(BadRequest, match="no such file or folder; name one of this machine"):
        describe_tokenizer(tmp_path / "none")
    refused(folder / "merges.txt", "it is a file; give the folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "it holds no file of a tokenizer, but nothing")
    (empty / "model.safetensors").write_bytes(b"x")
    refused(empty, "but model.safetensors")
    (folder / "vocab.json").touch()
    refused(folder, "vocab.json: vocab.json is empty")
    with (folder / "vocab.json").open("wb") as file:
        file.truncate(limits.MAX_TOKENIZER_FILE_BYTES + 1)
    refused(folder, f"has {limits.MAX_TOKENIZER_FILE_BYTES + 1} bytes: at most")
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(limits.MAX_TOKENIZER_BYTES // 3 + 1)
    refused(folder, "its files have .* bytes")
    (folder / "vocab.json").unlink()
    os.mkfifo(folder / "vocab.json")
    refused(folder, "not a regular file")
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").symlink_to("/dev/zero")
    refused(folder, "not a regular file")
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").symlink_to(tmp_path / "gone")
    refused(folder, "no such file")
