"""Tensors and messages that cross from host to host."""

from __future__ import annotations

import gc

import pytest
import torch

from xditd.client.cluster.messages import StoredTensors, decode, encode, load, store
from xditd.ipc.errors import BadMessage


def test_tensors_come_back_with_their_bits() -> None:
    tensors = {
        "bfloat16": torch.randn(3, 4).bfloat16(),
        "transposed": torch.arange(6).reshape(2, 3).T,
        "list": [torch.tensor(3.5), torch.empty(0, 2), torch.tensor([True, False])],
    }
    found = load(decode(memoryview(encode(store(tensors))), StoredTensors))
    assert torch.equal(found["bfloat16"], tensors["bfloat16"])
    assert torch.equal(found["transposed"], tensors["transposed"])
    assert [torch.equal(a, b) for a, b in zip(found["list"], tensors["list"], strict=True)] == [True] * 3
    assert [each.shape for each in found["list"]] == [each.shape for each in tensors["list"]]


def test_a_loaded_tensor_owns_its_memory() -> None:
    message = bytearray(encode(store({"a": torch.zeros(64)})))
    found = load(decode(memoryview(message), StoredTensors))["a"]
    message[-256:] = b"\xff" * 256
    assert torch.equal(found, torch.zeros(64))


def test_a_described_tensor_is_kept_until_it_is_encoded() -> None:
    described = store({"a": torch.full((1 << 16,), 7.0)})
    gc.collect()
    others = [torch.zeros(1 << 16) for _ in range(8)]
    found = load(decode(encode(described), StoredTensors))["a"]
    assert torch.equal(found, torch.full((1 << 16,), 7.0))
    assert len(others) == 8


def test_what_is_no_tensor_is_refused_by_name() -> None:
    (stored,) = store({"a": torch.zeros(4)}).values()
    message = encode({"a": {"dtype": "float32", "shape": (5,), "data": stored.data}})
    with pytest.raises(BadMessage, match=r"a: 16 bytes are no float32 tensor \(5,\)"):
        load(decode(message, StoredTensors))
    with pytest.raises(BadMessage, match="install the same xditd"):
        decode(encode({"a": {"dtype": "float32"}}), StoredTensors)
