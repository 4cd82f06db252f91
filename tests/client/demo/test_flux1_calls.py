"""Position ids of FLUX.1's tokens: kept tensors, made once for each size."""

import pytest

torch = pytest.importorskip("torch")

from xditd.client.demo.flux1_calls import image_ids, text_ids  # noqa: E402
from xditd.client.families.flux1 import image_positions, text_positions  # noqa: E402


def test_positions_are_kept_and_made_once():
    assert torch.equal(image_ids(6, 10).tensor, image_positions(3, 5))
    assert image_ids(6, 10) is image_ids(6, 10)
    assert torch.equal(text_ids(7).tensor, text_positions(7))
    assert text_ids(7) is text_ids(7)
