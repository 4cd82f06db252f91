"""Which products the fused blocks of a packed checkpoint have."""

from __future__ import annotations

from dataclasses import replace

import torch

from xditd.gpu_workers.packed.native_products import native_product
from xditd.gpu_workers.packed.products import Float8Products
from xditd.gpu_workers.packed.tensors import PackedTensor

NATIVE = PackedTensor(
    "float8", (32, 16), torch.zeros(32, 16, dtype=torch.float8_e4m3fn), torch.ones(()), native=native_product
)
NOT_CHOSEN = replace(NATIVE, native=None)


def fits(*weights: PackedTensor | torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    return Float8Products.fits(weights, dtype)


def test_float8_weights_are_multiplied_natively_if_that_was_chosen_for_most() -> None:
    assert fits(NATIVE, NATIVE)
    assert fits(NATIVE, NATIVE, NOT_CHOSEN)
    assert not fits(NATIVE, NOT_CHOSEN)
    assert not fits(NOT_CHOSEN, NOT_CHOSEN)
    scaled = replace(NATIVE, input_scale=torch.ones(()))
    assert fits(scaled, scaled)
    assert not fits(NATIVE, NATIVE, scaled)


def test_what_cannot_be_rounded_is_left_to_other_products() -> None:
    values = torch.zeros(32, 16, dtype=torch.uint8)
    for other in (
        torch.zeros(32, 16),
        replace(NATIVE, format="int8", values=values.view(torch.int8)),
        replace(NATIVE, values=values.view(torch.float8_e5m2)),
        replace(NOT_CHOSEN, quantises_input=False),
        replace(NATIVE, values=NATIVE.values.t()),
    ):
        assert not fits(NATIVE, NATIVE, other), other
    assert not fits(NATIVE, NATIVE, dtype=torch.float16)
