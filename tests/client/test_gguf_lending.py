"""GGUF files that are lent: their manifests, the bytes that workers read, and the names of what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import (
    GgufTensor,
    gguf_bytes,
    number_pair,
    packed_tensor,
    plain_tensor,
    random_blocks,
    string_pair,
)

from xditd.client.lending import Offer, describe
from xditd.client.tensor_files import read_tensors
from xditd.ipc import codec
from xditd.ipc.errors import BadCheckpoint, BadRequest, RequestError, Unsupported
from xditd.ipc.packed import PackedWeight
from xditd.ipc.processes import identify
from xditd.ipc.requests import Lend
from xditd.ipc.tensors import CopiedBytes, FileBlock, Tier
from xditd.ipc.transports.file import map_file
from xditd.ipc.transports.fingerprints import check_fingerprint
from xditd.ipc.transports.tensor_views import BlockViews

BIAS = torch.arange(6.0)
WIDE = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).bfloat16()
Q8_0 = random_blocks("q8_0", 6, 64, 0)
Q4_K = random_blocks("q4_k", 2, 512, 1)
PACKED = (PackedWeight("a.weight", "q8_0", (6, 64)), PackedWeight("b.weight", "q4_k", (2, 512)))
STORED = {"a.weight": Q8_0, "a.bias": BIAS, "b.weight": Q4_K, "c.weight": WIDE}
TENSORS = [
    packed_tensor("a.weight", "q8_0", Q8_0, 64),
    plain_tensor("a.bias", BIAS),
    packed_tensor("b.weight", "q4_k", Q4_K, 512),
    plain_tensor("c.weight", WIDE),
]
FLUX = string_pair("general.architecture", "flux")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-Q4_K_M.gguf"
    path.write_bytes(gguf_bytes(TENSORS, [FLUX]))
    return path


def sent(offer: Offer) -> Lend:
    """What arrives of an offer at the daemon."""
    request = codec.request_decoder.decode(codec.encode(Lend(request_id="r", manifest=offer.manifest)))
    assert isinstance(request, Lend)
    assert request.manifest.faults() == []
    return request


def test_a_file_is_lent_packed_without_reading_it(path: Path, offers: list[Offer]) -> None:
    offers.append(describe(path))
    manifest = sent(offers[0]).manifest
    assert (manifest.tiers, offers[0].copied, manifest.label) == ((Tier.FILE,), CopiedBytes(), "tiny-Q4_K_M")
    assert manifest.packed == PACKED
    assert manifest.compute_dtype is None
    block = manifest.blocks[0]
    assert isinstance(block, FileBlock)
    assert block.size_bytes == path.stat().st_size
    mapping = map_file(block, identify(os.getpid()))
    check_fingerprint(mapping.bytes_tensor(), block.fingerprint, "x")
    found = {spec.name: BlockViews(mapping.bytes_tensor()).view(spec).clone() for spec in manifest.tensors}
    mapping.close()
    assert found.keys() == STORED.keys()
    for name, tensor in STORED.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_whole_header_is_fingerprinted(path: Path, offers: list[Offer]) -> None:
    """So that another file in its place, with the same names and other types or offsets, is no match."""
    offers.append(describe(path))
    fingerprint = offers[0].manifest.blocks[0].fingerprint
    first = min(spec.offset_bytes for spec in offers[0].manifest.tensors)
    assert first - 32 < fingerprint.length_bytes <= first


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_file_is_loaded_into_an_arena(path: Path, offers: list[Offer], device: str) -> None:
    offers.append(describe(path, device=device))
    manifest = sent(offers[0]).manifest
    assert manifest.packed == PACKED
    assert manifest.tiers == ((Tier.HOST_SHM,) if device == "cpu" else (Tier.CUDA_IPC,))
    assert offers[0].copied.total >= sum(tensor.nbytes for tensor in STORED.values())
    specs = {spec.name: (spec.dtype, spec.shape) for spec in manifest.tensors}
    assert specs == {name: (str(each.dtype)[6:], tuple(each.shape)) for name, each in STORED.items()}


def test_a_file_is_found_by_its_first_bytes_whatever_it_is_called(path: Path, offers: list[Offer]) -> None:
    offers.append(describe(path.rename(path.with_name("x.safetensors"))))
    assert offers[0].manifest.packed == PACKED


def language_model(name: str = "blk.0.attn_q.weight") -> bytes:
    return gguf_bytes([GgufTensor(name, 0, (4,), bytes(16))], [string_pair("general.architecture", "qwen2vl")])


def encoder(name: str) -> bytes:
    names = ("token_embd.weight", "enc.blk.0.attn_q.weight", name)
    tensors = [GgufTensor(each, 0, (8,), bytes(32), 32 * number) for number, each in enumerate(names)]
    return gguf_bytes(tensors, [string_pair("general.architecture", "t5encoder")])


def truncated() -> bytes:
    return gguf_bytes(TENSORS, [FLUX])[:-40]


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("x.gguf", language_model(), Unsupported, "a language model (general.architecture is 'qwen2vl')"),
        ("x.gguf", language_model("token_embd.weight"), Unsupported, "in llama.cpp's names, such as token_embd.weight"),
        ("x.gguf", language_model("dec.blk.3.ffn_up.weight"), Unsupported, "lend a safetensors file of it"),
        ("x.gguf", encoder("shared.weight"), BadCheckpoint, "several tensors are shared.weight"),
        ("x.gguf", truncated(), BadCheckpoint, "the file is truncated: get it again"),
        ("x.gguf", gguf_bytes([], [FLUX]), BadRequest, "component 'x' without tensors: nothing to lend"),
        ("x.gguf", gguf_bytes(TENSORS, [number_pair("split.count", 2, 2, "H")]), BadCheckpoint, "one of the 2 files"),
        ("x-00001-of-00002.gguf", gguf_bytes(TENSORS, [FLUX]), BadCheckpoint, "file 1 of the 2 that make this"),
        ("x.gguf", b"GGUF" + bytes(60), BadCheckpoint, "a GGUF file of version 0; versions 2 and 3 are read"),
        ("x.gguf", b"", BadCheckpoint, "this is an empty file"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(
    tmp_path: Path, name: str, content: bytes, error: type[RequestError], says: str, open_fds: Callable[[], int]
) -> None:
    (tmp_path / name).write_bytes(content)
    before = open_fds()
    for device in (None, "cpu"):
        with pytest.raises(error) as caught:
            describe(tmp_path / name, device=device)
        assert says in caught.value.detail
        assert len(caught.value.detail) < 700
    assert open_fds() == before


def test_a_file_does_not_run_as_a_class(path: Path) -> None:
    (path.parent / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(BadRequest, match=r"tiny-Q4_K_M\.gguf: to run as its class, it needs the names of its class"):
        describe(path, as_class=True)


def test_a_folder_is_named_with_its_files(path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"lend one of them: tiny-Q4_K_M\.gguf"):
        describe(path.parent)


def test_embeddings_are_not_read_from_it(path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="this is a GGUF file, and here only safetensors files are read"):
        read_tensors(path)
