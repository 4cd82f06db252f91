"""FlashAttention 3 with a last round that is split: which queries are; only the order of sums changes."""

from __future__ import annotations

import random

import pytest
import torch

from xditd.gpu_workers.kernels import flash3
from xditd.gpu_workers.kernels.flash3 import FEWEST_KEYS, PARTS, TILE_TOKENS, Division, divide

H200 = 132


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "expected"),
    [
        (12, 4608, 4608, Division(4224, 384)),  # two GPUs: 3.27 rounds
        (12, 4600, 4600, Division(4224, 376)),  # the last tile is not full
        (24, 4608, 4608, Division(4608, 0)),  # one GPU: 6.55, and a round that is half full is left alone
        (12, 4224, 4224, Division(4224, 0)),  # three rounds
        (12, 1024, 4608, Division(1024, 0)),  # less than one
        (12, 4608, FEWEST_KEYS - 1, Division(4608, 0)),
    ],
)
def test_a_last_round_with_few_tiles_is_split(heads, queries, keys, expected):
    assert divide(heads, queries, keys, H200) == expected


def test_whole_rounds_stay_whole_and_the_rest_fits_one_round():
    chance = random.Random(1)
    split = 0
    for _ in range(2000):
        heads, queries = chance.randrange(1, 100), chance.randrange(1, 20_000)
        whole, rest = divide(heads, queries, queries, H200)
        assert whole + rest == queries
        if rest:
            split += 1
            assert whole % TILE_TOKENS == 0
            assert heads * -(-rest // TILE_TOKENS) * PARTS <= H200
    assert split > 100


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 12, 4608), (2, 6, 4600), (1, 12, 4225)])
@torch.inference_mode()
def test_the_result_is_as_near_to_float32_as_without_and_repeats(batch, heads, tokens, monkeypatch):
    if not flash3.is_installed() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs fa3-fwd and a Hopper GPU")
    generator = torch.Generator("cuda").manual_seed(1)
    parts = torch.randn(3, batch, tokens, heads, 128, dtype=torch.bfloat16, device="cuda", generator=generator)
    query, key, value = (part.transpose(1, 2) for part in parts)
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())

    def error_of(result: torch.Tensor) -> float:
        return float((result.float() - expected).norm() / expected.norm())

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    if processors == H200:
        assert divide(batch * heads, tokens, tokens, processors).split
    attend = flash3.forward()
    found = attend(query, key, value)
    assert found.shape == query.shape
    assert torch.equal(found, attend(query, key, value))
    monkeypatch.setattr(flash3, "FEWEST_KEYS", tokens + 1)
    assert error_of(found) <= 1.01 * error_of(attend(query, key, value)) < 0.01
