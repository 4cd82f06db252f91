"""What cannot be lent is refused by name, and leaves no descriptor open."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lent_values import VAE, State
from safetensors.torch import load_file, save_file

from xditd.client.lending import describe
from xditd.ipc import limits
from xditd.ipc.errors import BadCheckpoint, BadRequest, OutOfMemory, Unsupported, UnsupportedDtype, XditdError


def test_what_is_known_to_be_refused_is_not_loaded_onto_a_device(tmp_path: Path, open_fds: Callable[[], int]) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(3, 3)}, path)
    before = open_fds()
    with pytest.raises(Unsupported, match=r"^lora: a LoRA in diffusers' names"):
        describe(path, device="cuda")
    assert open_fds() == before


def test_one_of_several_files_is_refused_although_it_is_sound(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model-00002-of-00003.safetensors"
    save_file(state, path)
    with pytest.raises(BadCheckpoint, match="this is file 2 of the 3 that make this checkpoint"):
        describe(path)


class Subclass(torch.Tensor):
    """A tensor subclass without accessible memory, as in quantisation libraries."""

    @staticmethod
    def __new__(cls) -> Subclass:
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        raise NotImplementedError(str(function))


def freed() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("source", "error", "what"),
    [
        ({}, BadRequest, "nothing to lend"),
        ({"decoder.x": torch.ones(3, device="meta")}, BadRequest, "decoder.x"),
        (
            {"decoder.x": torch.zeros(3, dtype=torch.complex32)},
            UnsupportedDtype,
            "tensor decoder.x: dtype complex32 cannot be sent: convert it",
        ),
        ({"decoder.x": torch.ones(3, 3).to_sparse()}, BadRequest, "decoder.x"),
        ({"decoder.x": 3}, BadRequest, "decoder.x"),
        ({"decoder.x": None}, BadRequest, "decoder.x"),
        ({"decoder.x": [torch.ones(3)]}, BadRequest, "decoder.x"),
        ({7: torch.ones(3)}, BadRequest, "7"),
        ({"": torch.ones(3)}, BadRequest, "name"),
        ({"decoder." + "x" * 600: torch.ones(3)}, BadRequest, "name"),
        ({"decoder.\ud800": torch.ones(3)}, BadRequest, "name"),
        ({"decoder.x": torch.ones((1,) * 9)}, BadRequest, "9 dimensions"),
        ({"decoder.x": freed()}, BadRequest, "decoder.x"),
        ({"decoder.x": Subclass()}, BadRequest, "decoder.x"),
        ({f"decoder.{n}": torch.zeros(0) for n in range(limits.MAX_TENSORS + 1)}, BadRequest, "16385"),
        (None, BadRequest, "NoneType"),
        (3, BadRequest, "int"),
        ([torch.ones(3)], BadRequest, "list"),
        ("/nonexistent/x.safetensors", BadRequest, "no such file"),
        ("/", BadCheckpoint, "this is a folder without a config.json and without safetensors or GGUF files"),
        ("/dev/null", BadCheckpoint, "not a regular file"),
        ("nul\0byte", BadRequest, "null byte is in no file's name"),
        ("", BadRequest, "^'': no such file"),
    ],
    ids=lambda value: (
        type(value).__name__ if not isinstance(value, (str, type)) else str(value)[:20].replace("\0", "0")
    ),
)
def test_tensors_that_cannot_be_lent_are_named_and_leave_nothing(
    source: Any, error: type[XditdError], what: str, open_fds: Callable[[], int]
) -> None:
    gc.collect()
    before = open_fds()
    with pytest.raises(error, match=what):
        describe(source)
    assert open_fds() == before


def test_a_good_tensor_does_not_hide_a_bad_one(state: State, open_fds: Callable[[], int]) -> None:
    before = open_fds()
    for bad in (torch.ones(3, device="meta"), torch.zeros(3, dtype=torch.complex32)):
        for device in (None, "cpu"):
            with pytest.raises((BadRequest, UnsupportedDtype)):
                describe(state | {"decoder.bad": bad}, device=device)
    assert open_fds() == before


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99", ""])
def test_unknown_devices_are_refused(path: Path, state: State, device: str, open_fds: Callable[[], int]) -> None:
    before = open_fds()
    for source in (path, state):
        with pytest.raises(Unsupported, match="device"):
            describe(source, device=device)
    assert open_fds() == before


@pytest.mark.parametrize("label", ["x" * 600, "\ud800"])
def test_labels_that_cannot_be_sent(state: State, label: str) -> None:
    with pytest.raises(BadRequest, match="label"):
        describe(state, label=label)


def test_invalid_files_are_refused_and_closed(tmp_path: Path, open_fds: Callable[[], int]) -> None:
    path = tmp_path / "x.safetensors"
    before = open_fds()
    for content in (b"", b"nonsense", bytes(64), (2).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        for device in (None, "cpu"):
            with pytest.raises((BadCheckpoint, BadRequest)):
                describe(path, kind=VAE, device=device)
    assert open_fds() == before


def test_no_descriptor_left(path: Path, state: State, no_free_fd: Callable[[], None]) -> None:
    loaded = load_file(path)
    no_free_fd()
    for source in (path, state, loaded):
        with pytest.raises(OutOfMemory, match="open files"):
            describe(source)
