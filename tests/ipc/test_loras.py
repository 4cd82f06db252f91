"""Manifests of LoRAs: every way in which factors and layers do not fit together is a fault that names them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from xditd.ipc.loras import LoraDescription, LoraLayer
from xditd.ipc.tensors import ComponentKind, Fingerprint, HostShmBlock, Manifest, TensorSpec

BLOCK = HostShmBlock(fd=3, inode=1, size_bytes=4096, fingerprint=Fingerprint(length_bytes=0, digest=bytes(16)))
DOWN = TensorSpec("down", "float32", (2, 8), 0, 0)
UP = TensorSpec("up", "float32", (6, 2), 0, 256)
LAYER = LoraLayer("a_b", "model", "down", "up", 0.5)


def manifest(*tensors: TensorSpec, layers: tuple[LoraLayer, ...] = (LAYER,), **more: Any) -> Manifest:
    given: dict[str, Any] = {"kind": ComponentKind.LORA, "lora": LoraDescription(layers=layers)} | more
    return Manifest(label="x", blocks=(BLOCK,), tensors=tensors or (DOWN, UP), **given)


def test_a_whole_lora_has_no_faults() -> None:
    assert manifest().faults() == []


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (manifest(DOWN, UP, TensorSpec("x", "float32", (1,), 0, 0)), "tensor x is of no layer of the LoRA"),
        (manifest(DOWN), "layer a_b has no tensor up"),
        (manifest(layers=(LAYER, LAYER)), "layer a_b is listed twice, the second time by down"),
        (manifest(DOWN, TensorSpec("up", "float32", (6, 3), 0, 0)), "tensor down [2, 8] has rank 2, but up [6, 3] has"),
        (
            manifest(DOWN, TensorSpec("up", "float32", (6,), 0, 0)),
            "tensors down [2, 8] and up [6] are not two",
        ),
        (manifest(DOWN, TensorSpec("up", "float32", (0, 2), 0, 0)), "are not two matrices"),
        (manifest(DOWN, TensorSpec("up", "int8", (6, 2), 0, 0)), "tensor up is int8, not float32, bfloat16, float16"),
        (manifest(kind=ComponentKind.VAE), "the kind lora and the description of a LoRA come together"),
        (manifest(kind=None), "the kind lora and the description of a LoRA come together"),
        (manifest(lora=None), "the kind lora and the description of a LoRA come together"),
    ],
)
def test_each_fault_is_named(given: Manifest, fault: str) -> None:
    assert any(fault in each for each in given.faults()), given.faults()


def test_layers_of_two_parts_may_have_one_name() -> None:
    other = msgspec.structs.replace(LAYER, part="text_encoder")
    assert manifest(layers=(LAYER, other)).faults() == []


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1e7])
def test_scales_are_bounded(scale: float) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(["a", "model", "d", "u", scale], LoraLayer)
